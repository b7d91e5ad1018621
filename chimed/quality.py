"""Is a translation good? Rules between an English text and its Chinese."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from math import inf
from pathlib import Path

from common.rows import BadRow, Records
from common.text import CJK, WORD, chinese_share, clean_text, is_untranslated, text_key

# --- 1. words that the rules look for -------------------------------------------------------------

# a model that does not translate but excuses itself
REFUSAL = re.compile(
    r"""
      (?:抱歉|对不起)[，,。 ]{0,2}(?:但)?我
    | (?:我|助手[，,]?)(?:无法|不能|不会)(?:为您|为你|继续)?
      (?:翻译|提供|协助|满足|完成|回答|处理|帮助)
    | I(?:'|’|[ ]a)m[ ]sorry
    | I[ ](?:can(?:no|'|’)t|am[ ]unable[ ]to)[ ](?:assist|help|translate|provide|comply|fulfil)
    """,
    re.IGNORECASE | re.VERBOSE,
)
# what a model says around its translation
LEFTOVER = re.compile(
    r"""
      作为(?:一个|一名|一款)?\s*(?:AI|人工智能|语言模型|大模型)
    | \bas[ ]an[ ]AI\b
    | 人工智能助手
    | AI[ ]?(?:助手|翻译|生成)
    | (?:译文|翻译)(?:如下|结果)?\s*[:：]
    | (?:以下|以上|这)(?:是|为)?.{0,6}(?:译文|翻译)
    | 希望.{0,12}(?:帮助|满意)
    | 随时告诉我
    | \bchinese\s*[:：]
    | \btranslation\s*[:：]
    | \bhere(?:[ ]is|'s)[ ]the\b
    | ```
    | 请提供(?:更多|需要)
    """,
    re.IGNORECASE | re.VERBOSE,
)
# Cyrillic, Arabic, kana, Hangul
OTHER_SCRIPT = re.compile(r"[\u0400-\u04ff\u0600-\u06ff\u3040-\u30ff\uac00-\ud7af]")

# left and right that are no sides, in English
LEFT_VERB = re.compile(
    r"""
      \bleft\s+(?:
          untreated|unrepaired
        | the[ ](?:hospital|clinic|patient)
        | against|without|behind|undisturbed
        | in[ ](?:place|situ)
        | alone|open|over
        | with[ ](?:no|a|an|some)
        | to[ ]heal
      )
    | \bright[ ](?:away|now|after|before|diagnosis|answer|time)\b
    | \ball[ ]right\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
# and in Chinese: "about", and drugs
SIDE_IDIOM = re.compile(r"左右|左(?:氧|旋|甲状腺素|卡尼|乙拉|炔)|右(?:旋|美沙|美托|佐匹)")


@dataclass(frozen=True)
class Side:
    """A side of the body in both languages."""

    words: str
    # what else may stand for it in the original: abbreviations (RUL), Latin
    others: str
    character: str


SIDES = {
    "left": Side(r"\bleft\b", r"\bL[A-Z]{1,4}\b|\bL\b|sinistr|levo", "左"),
    "right": Side(r"\bright\b", r"\bR[A-Z]{1,4}\b|\bR\b|dextr", "右"),
}
# what may be 双侧 or 两侧 in Chinese
BOTH_SIDES_EN = re.compile(
    r"""
    bilateral|\bboth\b|\btwo\b|\beither\b|\beach\b|side|symmetr|\bpair|lateral|bi
    """,
    re.IGNORECASE | re.VERBOSE,
)
SWAP_SIDES = str.maketrans("左右", "右左")

# negations that a translation must have
NOT_EN = re.compile(
    r"""
      \b(?:
          no|not|without|never|neither|nor|none|cannot
        | absen(?:t|ce)
        | (?:sero)?negative
        | den(?:y|ies|ied)
        | lack(?:s|ed|ing)?
        | unable|inability
        | un(?:known|remarkable|successful|changed)
      )\b(?!\.\s*\d)
    | n['’]t\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
# these become 无, 不, 非 or 未
SOFT_NOT_EN = re.compile(
    r"""
    \b(?:
        asymptomatic|afebrile
      | irregular\w*
      | heterogen\w+
      | non-?(?!etheless)\w{4,}
      | un(?:treated|stable|displaced|clear|specific|responsive|detect\w+)
      | painless|incomplete|insufficient|impossible
      | free[ ]of|failed[ ]to
      | sterile|anechoic
    )\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
# English that holds "not" or "non" without a negation of its own in Chinese
NO_NEGATION_EN = re.compile(
    r"""
      \bnon-?(?:contrast|enhanced|small|steroidal)\b
    | \bnot[ ]only\b
    | \bnot\b(?=[^.]{0,80}\buntil\b)
    """,
    re.IGNORECASE | re.VERBOSE,
)
# a negation in Chinese, for each of which the original may have one
NOT_ZH = re.compile(
    r"""
      [无没未不非否勿莫]
    | 阴性|缺乏|缺如|难以|消失|排除|禁止|零|正常|失败
    | 负(?![荷责担])
    | 除外
    | 免(?!疫)
    | 缺失
    """,
    re.VERBOSE,
)
# the characters without the meaning
NO_NEGATION_ZH = re.compile(
    r"""
      非常|不同|不仅|不断|不久|未来|非洲|不过|无论|否则|不但|不管|不只
    | 是否|能否|可否|有无|与否
    | 非小细胞|非霍奇金|非甾体|无名|不良|不适|无力
    """,
    re.VERBOSE,
)
# a negation beyond doubt: the original must have a word for it
SURE_NOT_ZH = re.compile(
    r"""
    [无没未]|不[能可是会存再]|否认|并非|阴性|不均|不规则
    """,
    re.VERBOSE,
)
# and all that such a word may be
MAYBE_NOT_EN = re.compile(
    r"""
      n['’]t\b
    | \b(?:
          no|not|nor|none|nil|never|neither|without|cannot|free|except|unless
        | less|fewer|only|other[ ]than|rather[ ]than|instead
        | zero|until|than|stop|ill|poor|low
      )\b
    | absen|negativ|sessile
    | \bden(?:y|ie)
    | lack|fail
    | less\b
    | normal|remark|exclu
    | rule[sd]?[ ]out
    | \bnon
    | \bun(?!der|til|i)
    | \bdis(?!eas|k|c\b|tal|tr|char|play|tin|sect|cus|ord|cover)
    | \bin(?!clud|creas|fect|to|side|it|ter|jur|flam|volv|dic|vas|fus|tra|fil|form|hal|stit|sul|test
        )[a-z]
    | \bim(?!ag|prov|plant|port|med|mun|pact|por)[a-z]
    | \birr
    | illeg|hetero
    | \ba(?:symptom|febrile|vascular|cellular|troph|nechoic|nuri|typic|menorr|pn|tax|phas|symm|fib)
    | devoid|spar|resol|clear|missing|loss|lost|minus|empty|refus|declin|blur|vague|limit|hypo
    | difficult|steril|waive
    """,
    re.IGNORECASE | re.VERBOSE,
)

# --- 2. units -------------------------------------------------------------------------------------

# unit: how it is written in English after a number, and in Chinese;
# compounds (毫克, 毫升, 千克) are not their parts
UNITS = {
    "mm": (r"mm|millimet(?:er|re)s?", r"mm(?![a-zA-Z])|毫米|㎜"),
    "cm": (r"cm|centimet(?:er|re)s?", r"cm|厘米|公分|㎝"),
    "μm": (r"[µμu]m|microns?|micromet(?:er|re)s?", r"[µμu]m(?![a-zA-Z])|微米|μ(?![a-zA-Z])"),
    "nm": (r"nm|nanomet(?:er|re)s?", r"nm|纳米"),
    "kg": (r"kg|kilograms?", r"kg|公斤|千克|㎏"),
    "mg": (r"mg|milligrams?", r"mg|毫克|㎎"),
    "μg": (r"[µμu]g|mcg|micrograms?", r"[µμu]g|mcg|微克"),
    "g": (r"g|gm|grams?", r"(?<![a-zA-Zµμ])gm?(?![a-zA-Z])|(?<![毫微千纳])克"),
    "ml": (r"m[lL]|millilit(?:er|re)s?|cc", r"m[lL]|毫升|cc"),
    "dl": (r"d[lL]|decilit(?:er|re)s?", r"d[lL]|分升"),
    "l": (r"L|lit(?:er|re)s?", r"(?<![a-zA-Zµμ])[lL](?![a-zA-Z])|(?<![毫分微])升"),
    "mmHg": (r"mm ?Hg", r"mm ?Hg|毫米汞柱"),
    "%": (r"%|percent|per cent", r"%|百分之|百分点"),
    "°C": (r"° ?C|℃|degrees Celsius", r"℃|° ?C|摄氏|度"),
    "MHz": (r"MHz", r"MHz|兆赫"),
    "kHz": (r"kHz", r"kHz|千赫"),
    "Gy": (r"Gy", r"(?<!c)Gy|戈瑞"),
    "cGy": (r"cGy", r"cGy|厘戈"),
    "HU": (r"HU|Hounsfield", r"HU|亨"),
    "years": (r"years?|yrs?|y/?o", r"岁|年"),
    "months": (r"months?", r"月"),
    "weeks": (r"weeks?|wks?", r"周|星期|礼拜"),
    "days": (r"days?", r"天|日"),
    "hours": (r"hours?|hrs?", r"小时|时|h|钟头"),
    "minutes": (r"minutes?|mins?", r"分|min"),
    "seconds": (r"seconds?|secs?", r"秒|\bs\b"),
}
# words, not symbols: they may be written in capitals
TIMES = ("years", "months", "weeks", "days", "hours", "minutes", "seconds")
# unmistakable without a number, too
UNMISTAKABLE = ("mm", "cm", "kg", "mg", "mmHg")
# what stands before a unit in English
NUMBER_EN = (
    r"(?:(?<![\d.,])\d[\d,]*+(?:[.·]\d++)?+"
    r"|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty"
    r"|several|few|half an?|a|per))"
)


def _alone(english):
    """The pattern of a unit's name that is no part of a word."""
    return rf"(?<![A-Za-z])(?:{english})(?![A-Za-z])"


def unit_in_english(unit: str) -> re.Pattern:
    """What says that an English text measures something in a unit."""
    english, _ = UNITS[unit]
    if unit in UNMISTAKABLE:
        return re.compile(_alone(english))
    if unit == "seconds":
        # "a second biopsy" is none
        return re.compile(rf"\d[\s-]?(?:{english})\b")
    after_number = rf"{NUMBER_EN}[\s-]?(?:{english})(?![A-Za-z])"
    if unit == "days":
        after_number += r"|\bdaily\b"
    return re.compile(after_number, re.IGNORECASE if unit in TIMES else 0)


UNIT_EN = {unit: unit_in_english(unit) for unit in UNITS}
UNIT_ZH = {unit: re.compile(chinese) for unit, (_, chinese) in UNITS.items()}

# Units that a translation must not invent: how it says them after a number, and what must then be
# in the original. The symbols are written as in UNITS.
INVENTED_SYMBOLS = ("mm", "cm", "μm", "kg", "mg", "μg", "g", "ml", "mmHg", "%")
SEVERAL_ZH = "两二三四五六七八九十"
MONTH_NAMES = "jan|feb|mar|apr|may|june|july|aug|sep|oct|nov|dec"
INVENTED_TIMES = {
    "years": (
        rf"[\d{SEVERAL_ZH}半每](?:年(?![龄轻长])|周?岁)(?!代)",
        r"year|yr|\by\b|y/?o|decade|annual|centur|\b(?:1[89]|20)\d\d|-?aged?\b|old",
    ),
    "months": (
        rf"[\d{SEVERAL_ZH}数每]个?月|半个月",
        rf"month|\bmo\b|{MONTH_NAMES}|\d/\d|\d-\d\d-|trimester|half a year",
    ),
    "weeks": (
        rf"[\d{SEVERAL_ZH}每](?:周(?![围岁边径身期])|个?星期)",
        r"week|wk|gestation|\bw\b|fortnight",
    ),
    "days": (
        rf"[\d{SEVERAL_ZH}每](?:天|日(?!龄期))",
        r"day|daily|date|\bd\b|/d\b"
        rf"|{MONTH_NAMES}|\d/\d|\d-\d\d|week|overnight|b\.?i\.?d|q\.?d",
    ),
    "hours": (rf"[\d{SEVERAL_ZH}半每]个?小时", r"hour|\bhrs?\b|\d ?h\b|/h|overnight"),
    "minutes": (rf"[\d{SEVERAL_ZH}半每]分钟", r"min|half an hour|quarter"),
}


@dataclass(frozen=True)
class Invented:
    """A unit said in Chinese, and what in the original it may come from."""

    chinese: re.Pattern
    english: re.Pattern


def invented_units() -> dict[str, Invented]:
    """{unit: Invented} of the symbols and the times."""
    units = {}
    for unit in INVENTED_SYMBOLS:
        english, chinese = UNITS[unit]
        units[unit] = Invented(re.compile(rf"\d\s*(?:{chinese})"), re.compile(_alone(english)))
    for unit, (chinese, english) in INVENTED_TIMES.items():
        units[unit] = Invented(re.compile(chinese), re.compile(english, re.IGNORECASE))
    return units


INVENTED = invented_units()

# --- 3. numbers -----------------------------------------------------------------------------------


def by_word(words_of: Mapping[int, str]) -> dict[str, int]:
    """{word: number} of a table of numbers and the words for each."""
    numbers = {}
    for number, words in words_of.items():
        for word in words.split():
            numbers[word] = number
    return numbers


# words for which a translation may have digits
WORD_NUMBERS = by_word(
    {
        0: "zero",
        1: "one first once single i january mono uni",
        2: "two twice both pair double ii february bi di dual second",
        3: "three third thirds triple thrice iii march tri",
        4: "four fourth iv april quadr tetra",
        5: "five fifth v may penta",
        6: "six sixth vi june hexa",
        7: "seven seventh vii july",
        8: "eight eighth viii august octa",
        9: "nine ninth ix september",
        10: "ten tenth x october",
        11: "eleven eleventh xi november",
        12: "twelve twelfth dozen xii december",
        13: "thirteen thirteenth",
        14: "fourteen fourteenth",
        15: "fifteen fifteenth",
        16: "sixteen sixteenth",
        17: "seventeen seventeenth",
        18: "eighteen eighteenth",
        19: "nineteen nineteenth",
        20: "twenty twentieth",
        25: "quarter",
        30: "thirty",
        40: "forty",
        50: "fifty half",
        60: "sixty",
        70: "seventy",
        80: "eighty",
        90: "ninety",
        100: "hundred",
        1000: "thousand",
    }
)
# words that a translation says as a number, too
SAID_NUMBERS = by_word(
    {
        2: "two twice",
        3: "three third thirds triple thrice",
        4: "four fourth",
        5: "five fifth",
        6: "six sixth",
        7: "seven seventh",
        8: "eight eighth",
        9: "nine ninth",
        10: "ten tenth",
        12: "twelve",
    }
)
ROMAN = {"II": 2, "III": 3, "IV": 4, "VI": 6, "VII": 7, "VIII": 8, "IX": 9}
SCALES_EN = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
SCALES_ZH = {"百": 100, "千": 1000, "万": 10**4, "百万": 10**6, "亿": 10**8}
DIGITS_ZH = {character: digit for digit, character in enumerate("零一二三四五六七八九")}
DIGITS_ZH |= {"两": 2, "〇": 0, "双": 2, "单": 1}
# inside a section of four digits, and what ends one
TENS_ZH = {"十": 10, "百": 100, "千": 1000}
MYRIADS_ZH = {"万": 10**4, "亿": 10**8}
NUMERAL_ZH = re.compile("[零〇一二三四五六七八九两双单十百千万亿]++")
# characters of another width or form, as they are compared
FORMS = {chr(0xFF10 + digit): str(digit) for digit in range(10)}
FORMS |= {character: f"^{digit}" for digit, character in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
FORMS |= {"．": ".", "·": ".", "％": "%"}
FORMS |= {"Ⅰ": "I", "Ⅱ": "II", "Ⅲ": "III", "Ⅳ": "IV", "Ⅴ": "V", "Ⅵ": "VI"}
WIDE = str.maketrans(FORMS)


def plain_number(text: str) -> Decimal:
    """A number as it is compared: 1,200 and 1200.0 are 1200."""
    text = text.replace(",", "").rstrip(".")
    if len(text) >= 20:
        # no measurement, but to be compared like one
        return Decimal(text_key(text))
    try:
        return Decimal(text).normalize()
    except InvalidOperation:
        return Decimal(0)


def numeral_value(numeral: str) -> int:
    """The value of a Chinese numeral: 十二 is 12, 三十五 is 35, 一百二十 is 120."""
    total = 0
    section = 0
    digit = 0
    for character in numeral:
        if character in DIGITS_ZH:
            digit = DIGITS_ZH[character]
        elif character in TENS_ZH:
            section += (digit or 1) * TENS_ZH[character]
            digit = 0
        else:
            total += ((section + digit) or 1) * MYRIADS_ZH[character]
            section = 0
            digit = 0
    return total + section + digit


def chinese_numbers(text: str) -> set[Decimal]:
    """The values that Chinese numerals in a text say (runs above 12 characters are none).

    十二 is 12, 三十五 is 35, 一百二十 is 120, and each digit of 二〇一九.
    """
    values = set()
    for numeral in NUMERAL_ZH.findall(text):
        if len(numeral) > 12:
            continue
        digits = [DIGITS_ZH[character] for character in numeral if character in DIGITS_ZH]
        values.update(digits)
        values.add(numeral_value(numeral))
        values.add(int("".join(map(str, digits)) or "0"))
    return {Decimal(value).normalize() for value in values}


def digit_numbers(text: str, scales: Mapping[str, int]) -> set[Decimal]:
    """The numbers written in digits, with the word for a scale behind them: 3 million, 5万."""
    names = "|".join(sorted(scales, key=len, reverse=True))
    pattern = rf"(\d++(?:,\d{{3}})*+(?:\.\d++)?+)\s*+((?:{names})(?!分))?"
    numbers = set()
    for digits, scale in re.findall(pattern, text, re.IGNORECASE):
        number = plain_number(digits) * scales.get(scale.lower(), 1)
        numbers.add(number.normalize())
    return numbers


def has_roman(token: str, text: str) -> bool:
    """True for a text with a Roman number that is no part of a word."""
    return bool(re.search(rf"(?<![A-Za-z]){token}(?![A-Za-z])", text))


def numbers_in_words(english: str) -> set[int]:
    """Numbers that a translation may write in digits: five, May, thirty-five, the 1990s."""
    words = re.findall(r"[a-z]+", english.lower())
    simple = {WORD_NUMBERS[word] for word in words if word in WORD_NUMBERS}
    tens = {number for number in simple if number >= 20 and number % 10 == 0}
    ones = {number for number in simple if 0 < number < 10}
    numbers = set(simple)
    # thirty-five
    for ten in tens:
        numbers |= {ten + one for one in ones}
    # the 1990s are 20世纪90年代
    for century, decade in re.findall(r"\b(\d\d)(\d0)s\b", english):
        numbers |= {int(century) + 1, int(decade), int(century + decade)}
    return numbers


def numbers_said(english: str) -> set[int]:
    """Numbers in words that a translation must say, too."""
    # not the five of thirty-five
    if re.search(r"ty\b|hundred|thousand|million", english):
        return set()
    words = re.findall(r"[a-z]+", english.lower())
    return {SAID_NUMBERS[word] for word in words if word in SAID_NUMBERS}


def roman_missing(english: str, chinese: str) -> set[int]:
    """Roman numbers of the original that the translation does not have as such."""
    tokens = set(re.findall(r"(?<![A-Za-z])[IVX]+(?![A-Za-z])", english)) & set(ROMAN)
    return {ROMAN[token] for token in tokens if not has_roman(token, chinese)}


def numbers_differ(english: str, chinese: str) -> str:
    """The numbers, as text, that only one side has, or "".

    Words (three, 三, May, II) may stand for digits on the other side.
    """
    chinese = chinese.translate(WIDE)
    english = english.translate(WIDE)
    # 10 9/L, its exponent no longer raised
    english = re.sub(r"(?<=[x\u00d7] 10)(?=[3-9]\b|1[0-2]\b)", "^", english)
    in_english = digit_numbers(re.sub(r"\b\d\d\d0s\b", " ", english), SCALES_EN)
    in_chinese = digit_numbers(chinese, SCALES_ZH)

    spoken = chinese_numbers(chinese)
    spoken |= {Decimal(number) for token, number in ROMAN.items() if has_roman(token, chinese)}
    asked = in_english | _decimals(numbers_said(english))
    asked |= _decimals(roman_missing(english, chinese))
    missing = asked - in_chinese - spoken

    invented = in_chinese - in_english - _decimals(numbers_in_words(english))
    if invented:
        # 2 hundred, said as 2 and 百
        invented -= {plain_number(digits) for digits in re.findall(r"\d+(?:\.\d+)?", english)}

    # Figure 2A
    panels = set(re.findall(r"\b\d+[A-H]\b", english))
    lost_panels = {panel for panel in panels if panel.lower() not in chinese.lower()}
    wrong = [f"{number:f}" for number in sorted(missing | invented)]
    return ", ".join([*wrong, *sorted(lost_panels)])


def _decimals(numbers):
    return {Decimal(number) for number in numbers}


# --- 4. one rule each -----------------------------------------------------------------------------


def units_differ(english: str, chinese: str) -> str:
    """The units that only one side has, or ""."""
    chinese = chinese.translate(WIDE)
    wrong = []
    for unit in UNITS:
        if UNIT_EN[unit].search(english) and not UNIT_ZH[unit].search(chinese):
            wrong.append(unit)
    for unit, invented in INVENTED.items():
        if invented.chinese.search(chinese) and not invented.english.search(english):
            wrong.append(unit)
    return ", ".join(dict.fromkeys(wrong))


def sides_differ(english: str, chinese: str) -> str:
    """left, right or bilateral when one side has it and the other has not, or has them in another
    order; "" otherwise."""
    english = LEFT_VERB.sub(" ", english)
    chinese = SIDE_IDIOM.sub(lambda found: "两" if found[0] == "左右" else " ", chinese)
    for name, side in SIDES.items():
        is_said = bool(re.search(side.words, english, re.IGNORECASE))
        is_translated = side.character in chinese
        if is_said == is_translated:
            continue
        if not (is_translated and re.search(side.others, english)):
            return name
    if are_sides_swapped(english, chinese):
        return "left and right swapped"
    if re.search(r"\bbilateral", english, re.IGNORECASE) and not re.search("[双两二各]", chinese):
        return "bilateral"
    if re.search("双侧|两侧", chinese) and not BOTH_SIDES_EN.search(english):
        return "bilateral"
    return ""


def are_sides_swapped(english: str, chinese: str) -> bool:
    """True when each left of the original is a right of the translation, and each right a left."""
    order = ""
    for word in re.findall(r"\b(left|right)\b", english, re.IGNORECASE):
        order += SIDES[word.lower()].character
    order_zh = "".join(re.findall("[左右]", chinese))
    if sorted(order) != sorted(order_zh):
        return False
    swapped = order_zh.translate(SWAP_SIDES)
    return order == swapped and swapped != order_zh


def negation_differs(english: str, chinese: str) -> bool:
    """True when the translation has fewer negations than the original, or more than the original
    can have, or 阳性 for negative."""
    english = NO_NEGATION_EN.sub(" ", english)
    # neither … nor is one negation
    neither_nor = r"(\bneither\b[^.]{0,80}?)\bnor\b"
    english = re.sub(neither_nor, r"\1 ", english, flags=re.IGNORECASE)
    if re.search(r"\bnormal", english, re.IGNORECASE):
        # the translation of normal, not of "no abnormality"
        chinese = chinese.replace("正常", " ")
    chinese = NO_NEGATION_ZH.sub(" ", chinese)

    n_english = len(NOT_EN.findall(english)) + len(SOFT_NOT_EN.findall(english))
    if len(NOT_ZH.findall(chinese)) < n_english:
        return True
    if len(SURE_NOT_ZH.findall(chinese)) > len(MAYBE_NOT_EN.findall(english)):
        return True
    n_positive = len(re.findall("positiv", english, re.IGNORECASE))
    n_negative = len(re.findall("negativ", english, re.IGNORECASE))
    if not n_negative:
        return False
    return chinese.count("阳性") > n_positive and chinese.count("阴性") < n_negative


def is_repetitive(text: str) -> bool:
    """A phrase four times in a row, a character ten times, or a long text of few different
    phrases."""
    if re.search(r"(.{3,40}?)\1{3,}|([^\W\d_])\2{9,}", text):
        return True
    phrases = [text[start : start + 4] for start in range(len(text) - 3)]
    return len(phrases) > 80 and len(set(phrases)) * 3 < len(phrases)


def has_little_chinese(source: str, text: str) -> bool:
    """True for a translation that is none, in part or as a whole."""
    if WORD.search(source) and not CJK.search(text):
        return True
    if OTHER_SCRIPT.search(text) and not OTHER_SCRIPT.search(source):
        return True
    # Candida auris (耳念珠菌) is well translated
    is_name = bool(CJK.search(text)) and len(source.split()) <= 3
    return is_untranslated(text) and not is_name


# English texts shorter than so many characters have, of each, at least and at most so many
# characters of Chinese
LENGTH_BANDS = [
    (40, 0.08, 1.2),
    (150, 0.08, 0.9),
    (inf, 0.17, 0.55),
]


def has_odd_length(source: str, text: str) -> bool:
    """True for a translation much shorter or longer than such a text has."""
    n_letters = len(re.sub(r"\s", "", source))
    if n_letters < 20:
        return False
    if chinese_share(source) >= 0.3 or source in text:
        return False
    low, high = next((low, high) for up_to, low, high in LENGTH_BANDS if len(source) < up_to)
    return not low < len(text) / len(source) < high


# --- 5. the glossary ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """An English term and the Chinese words for it, any of which will do."""

    english: str
    accepted: list[str]
    pattern: re.Pattern


def read_glossary(path: str | Path | None, encoding: str = "utf-8") -> list[Term]:
    """The terms, longest first, of a table with English and Chinese in its first two columns
    (`a|b`: either will do)."""
    if path is None:
        return []
    records = Records(path, encoding)
    if len(records.columns or ()) < 2:
        raise ValueError(
            f"{path}: a glossary is a .csv or .tsv with two columns, English and Chinese, "
            "and a header"
        )
    glossary = []
    for i in range(len(records)):
        try:
            english, chinese = (clean_text(value) for value in list(records.record(i).values())[:2])
        except BadRow as error:
            raise ValueError(f"{path}: row {i + 1}: {error}") from None
        accepted = [word.strip() for word in chinese.split("|") if word.strip()]
        if not english or not accepted:
            raise ValueError(f"{path}: row {i + 1}: English or Chinese is empty")
        if any(not CJK.search(word) and word != english for word in accepted):
            raise ValueError(
                f"{path}: row {i + 1}: {chinese!r} holds no Chinese: are the columns swapped?"
            )
        pattern = rf"(?<![A-Za-z]){re.escape(english)}(?:e?s)?(?![A-Za-z])"
        glossary.append(Term(english, accepted, re.compile(pattern, re.IGNORECASE)))
    return sorted(glossary, key=lambda term: -len(term.english))


def glossary_breaks(english: str, chinese: str, glossary: Iterable[Term]) -> list[str]:
    """English terms of the glossary that a text holds and whose Chinese the translation lacks."""
    broken = []
    rest = english
    # longest first: "left ventricle" hides the "ventricle" in it
    for term in glossary:
        if not term.pattern.search(rest):
            continue
        rest = term.pattern.sub(" ", rest)
        if not any(word in chinese for word in term.accepted):
            broken.append(term.english)
    return broken


# --- 6. all rules ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What a rule found. detail: what it was found by, where that can be said."""

    reason: str
    detail: str = ""


def quality(
    english: Mapping[str, str], chinese: Mapping[str, str], glossary: Sequence[Term] = ()
) -> list[str]:
    """Why the translation of a row is not good enough: ["reason: field, detail"], [] when every
    rule passes. english, chinese: {field: text}."""
    reasons = []
    for field, source in english.items():
        for fault in faults_of(source, chinese.get(field, ""), glossary):
            detail = f", {fault.detail}" if fault.detail else ""
            reasons.append(f"{fault.reason}: {field}{detail}")
    return reasons


def faults_of(source: str, text: str, glossary: Sequence[Term]) -> list[Fault]:
    """Every fault of the translation of one text; of one that is empty or endless only that."""
    if not text.strip():
        return [Fault("empty")]
    if len(text) > 3 * len(source) + 200:
        return [Fault("length ratio", f"{len(text) / len(source):.2f}")]
    return [*faults_of_facts(source, text), *faults_of_wording(source, text, glossary)]


def faults_of_facts(source: str, text: str) -> list[Fault]:
    """Is it Chinese, is all of it there, and does it say the same?"""
    faults = []
    if has_little_chinese(source, text):
        faults.append(Fault("Chinese share", f"{chinese_share(text):.0%}"))
    elif has_odd_length(source, text):
        faults.append(Fault("length ratio", f"{len(text) / len(source):.2f}"))
    numbers = numbers_differ(source, text)
    if numbers:
        faults.append(Fault("numbers", numbers))
    units = units_differ(source, text)
    if units:
        faults.append(Fault("units", units))
    side = sides_differ(source, text)
    if side:
        faults.append(Fault("laterality", side))
    if negation_differs(source, text):
        faults.append(Fault("negation"))
    return faults


def faults_of_wording(source: str, text: str, glossary: Sequence[Term]) -> list[Fault]:
    """Is it a translation and nothing else, in the words that were asked for?"""
    faults = []
    refusal = REFUSAL.search(text)
    if refusal and not REFUSAL.search(source):
        faults.append(Fault("refusal", refusal[0]))
    leftover = LEFTOVER.search(text)
    if leftover and not LEFTOVER.search(source):
        faults.append(Fault("leftover", leftover[0]))
    if is_repetitive(text) and not is_repetitive(source):
        faults.append(Fault("repeated text"))
    broken = glossary_breaks(source, text, glossary)
    if broken:
        faults.append(Fault("glossary", ", ".join(broken)))
    return faults


def reason_name(reason: str) -> str:
    """The rule that a reason comes from."""
    return reason.split(":")[0]


def reason_field(reason: str) -> str:
    """The field that a reason speaks of."""
    return reason.split(": ")[1].split(",")[0]

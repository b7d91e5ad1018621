"""Is a translation good? Rules between an English text and its Chinese."""

import re
from decimal import Decimal, InvalidOperation

from common.rows import BadRow, Records
from common.text import CJK, WORD, chinese_share, clean_text, is_untranslated, text_key

REFUSAL = re.compile(
    r"(?:抱歉|对不起)[，,。 ]{0,2}(?:但)?我|(?:我|助手[，,]?)(?:无法|不能|不会)(?:为您|为你|继续)?(?:翻译|提供|协助|满足|完成|回答|处理|帮助)"
    r"|I(?:'|’| a)m sorry|I (?:can(?:no|'|’)t|am unable to) (?:assist|help|translate|provide|comply|fulfil)",
    re.IGNORECASE,
)
LEFTOVER = re.compile(
    r"作为(?:一个|一名|一款)?\s*(?:AI|人工智能|语言模型|大模型)|\bas an AI\b|人工智能助手|AI ?(?:助手|翻译|生成)|(?:译文|翻译)(?:如下|结果)?\s*[:：]|(?:以下|以上|这)(?:是|为)?.{0,6}(?:译文|翻译)"
    r"|希望.{0,12}(?:帮助|满意)|随时告诉我|\bchinese\s*[:：]|\btranslation\s*[:：]|\bhere(?: is|'s) the\b|```|请提供(?:更多|需要)",
    re.IGNORECASE,
)
LEFT_VERB = re.compile(
    r"\bleft\s+(?:untreated|unrepaired|the (?:hospital|clinic|patient)|against|without|behind|undisturbed|in (?:place|situ)|alone|open|over|with (?:no|a|an|some)|to heal)"
    r"|\bright (?:away|now|after|before|diagnosis|answer|time)\b|\ball right\b",
    re.IGNORECASE,
)
SIDE_IDIOM = re.compile(
    r"左右|左(?:氧|旋|甲状腺素|卡尼|乙拉|炔)|右(?:旋|美沙|美托|佐匹)"
)  # "about", and drugs
SIDES = {  # side: words of the original, what else may stand for it there, its character
    "left": (r"\bleft\b", r"\bL[A-Z]{1,4}\b|\bL\b|sinistr|levo", "左"),
    "right": (r"\bright\b", r"\bR[A-Z]{1,4}\b|\bR\b|dextr", "右"),
}
OTHER_SCRIPT = re.compile(
    r"[\u0400-\u04ff\u0600-\u06ff\u3040-\u30ff\uac00-\ud7af]"
)  # Cyrillic, Arabic, kana, Hangul
NOT_EN = re.compile(
    r"\b(?:no|not|without|never|neither|nor|none|cannot|absen(?:t|ce)|(?:sero)?negative|den(?:y|ies|ied)|lack(?:s|ed|ing)?|unable|inability|un(?:known|remarkable|successful|changed))\b(?!\.\s*\d)|n['’]t\b",
    re.IGNORECASE,
)
SOFT_NOT_EN = re.compile(
    r"\b(?:asymptomatic|afebrile|irregular\w*|heterogen\w+|non-?(?!etheless)\w{4,}|un(?:treated|stable|displaced|clear|specific|responsive|detect\w+)|painless|incomplete|insufficient|"
    r"impossible|free of|failed to|sterile|anechoic)\b",
    re.IGNORECASE,
)  # these become 无, 不, 非 or 未
NOT_ZH = re.compile(
    r"[无没未不非否勿莫]|阴性|缺乏|缺如|难以|消失|排除|禁止|零|正常|失败|负(?![荷责担])|除外|免(?!疫)|缺失"
)
NO_NEGATION_ZH = re.compile(
    r"非常|不同|不仅|不断|不久|未来|非洲|不过|无论|否则|不但|不管|不只|是否|能否|可否|有无|与否|非小细胞|非霍奇金|非甾体|无名|不良|不适|无力"
)  # the characters without the meaning
SURE_NOT_ZH = re.compile(r"[无没未]|不[能可是会存再]|否认|并非|阴性|不均|不规则")
MAYBE_NOT_EN = re.compile(
    r"n['’]t\b|\b(?:no|not|nor|none|nil|never|neither|without|cannot|free|except|unless|less|fewer|only|other than|rather than|instead|zero|until|than|stop|ill|poor|low)\b|absen|negativ|sessile|\bden(?:y|ie)|lack|fail|less\b"
    r"|normal|remark|exclu|rule[sd]? out|\bnon|\bun(?!der|til|i)|\bdis(?!eas|k|c\b|tal|tr|char|play|tin|sect|cus|ord|cover)|\bin(?!clud|creas|fect|to|side|it|ter|jur|flam|volv|dic|vas|fus|tra|fil|form|hal|stit|sul|test)[a-z]|\bim(?!ag|prov|plant|port|med|mun|pact|por)[a-z]|\birr|illeg|hetero|\ba(?:symptom|febrile|vascular|cellular|troph|nechoic|nuri|typic|menorr|pn|tax|phas|symm|fib)|devoid|spar|resol|clear|missing|loss|lost|minus|empty|refus|declin|blur|vague|limit|hypo|difficult|steril|waive",
    re.IGNORECASE,
)
NUMBER_EN = r"(?:(?<![\d.,])\d[\d,]*+(?:[.·]\d++)?+|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|several|few|half an?|a|per))"
UNITS = {  # unit: how it is written in English after a number, and in Chinese; compounds (毫克, 毫升, 千克) are not their parts
    "mm": (r"mm|millimet(?:er|re)s?", r"mm(?![a-zA-Z])|毫米|㎜"),
    "cm": (r"cm|centimet(?:er|re)s?", r"cm|厘米|公分|㎝"),
    "μm": (r"[µμu]m|microns?|micromet(?:er|re)s?", r"[µμu]m(?![a-zA-Z])|微米|μ(?![a-zA-Z])"),
    "nm": (r"nm|nanomet(?:er|re)s?", "nm|纳米"),
    "kg": (r"kg|kilograms?", "kg|公斤|千克|㎏"),
    "mg": (r"mg|milligrams?", "mg|毫克|㎎"),
    "μg": (r"[µμu]g|mcg|micrograms?", r"[µμu]g|mcg|微克"),
    "g": (r"g|gm|grams?", r"(?<![a-zA-Zµμ])gm?(?![a-zA-Z])|(?<![毫微千纳])克"),
    "ml": (r"m[lL]|millilit(?:er|re)s?|cc", r"m[lL]|毫升|cc"),
    "dl": (r"d[lL]|decilit(?:er|re)s?", "d[lL]|分升"),
    "l": (r"L|lit(?:er|re)s?", r"(?<![a-zA-Zµμ])[lL](?![a-zA-Z])|(?<![毫分微])升"),
    "mmHg": (r"mm ?Hg", r"mm ?Hg|毫米汞柱"),
    "%": (r"%|percent|per cent", r"%|百分之|百分点"),
    "°C": (r"° ?C|℃|degrees Celsius", r"℃|° ?C|摄氏|度"),
    "MHz": ("MHz", "MHz|兆赫"),
    "kHz": ("kHz", "kHz|千赫"),
    "Gy": ("Gy", r"(?<!c)Gy|戈瑞"),
    "cGy": ("cGy", "cGy|厘戈"),
    "HU": ("HU|Hounsfield", "HU|亨"),
    "years": (r"years?|yrs?|y/?o", "岁|年"),
    "months": (r"months?", "月"),
    "weeks": (r"weeks?|wks?", "周|星期|礼拜"),
    "days": (r"days?", "天|日"),
    "hours": (r"hours?|hrs?", r"小时|时|h|钟头"),
    "minutes": (r"minutes?|mins?", r"分|min"),
    "seconds": (r"seconds?|secs?", r"秒|\bs\b"),
}
UNIT_EN = {
    unit: re.compile(
        rf"{NUMBER_EN}[\s-]?(?:{en})(?![A-Za-z])",
        re.IGNORECASE
        if unit in ("years", "months", "weeks", "days", "hours", "minutes", "seconds")
        else 0,
    )
    for unit, (en, _) in UNITS.items()
}
UNIT_EN["seconds"] = re.compile(r"\d[\s-]?(?:seconds?|secs?)\b")  # "a second biopsy" is none
UNIT_EN["days"] = re.compile(rf"{UNIT_EN['days'].pattern}|\bdaily\b", re.IGNORECASE)
UNIT_EN |= {
    unit: re.compile(rf"(?<![A-Za-z])(?:{UNITS[unit][0]})(?![A-Za-z])")
    for unit in ("mm", "cm", "kg", "mg", "mmHg")
}  # unmistakable without a number, too
UNIT_ZH = {unit: re.compile(zh) for unit, (_, zh) in UNITS.items()}
INVENTED = {  # unit: how a translation says it after a number, and what must then be in the original
    **{
        unit: (rf"\d\s*(?:{UNITS[unit][1]})", rf"(?<![A-Za-z])(?:{UNITS[unit][0]})(?![A-Za-z])")
        for unit in ("mm", "cm", "μm", "kg", "mg", "μg", "g", "ml", "mmHg", "%")
    },
    "years": (
        r"[\d两二三四五六七八九十半每](?:年(?![龄轻长])|周?岁)(?!代)",
        r"year|yr|\by\b|y/?o|decade|annual|centur|\b(?:1[89]|20)\d\d|-?aged?\b|old",
    ),
    "months": (
        "[\\d两二三四五六七八九十数每]个?月|半个月",
        r"month|\bmo\b|jan|feb|mar|apr|may|june|july|aug|sep|oct|nov|dec|\d/\d|\d-\d\d-|trimester|half a year",
    ),
    "weeks": (
        "[\\d两二三四五六七八九十每](?:周(?![围岁边径身期])|个?星期)",
        r"week|wk|gestation|\bw\b|fortnight",
    ),
    "days": (
        r"[\d两二三四五六七八九十每](?:天|日(?!龄期))",
        r"day|daily|date|\bd\b|/d\b|jan|feb|mar|apr|may|june|july|aug|sep|oct|nov|dec|\d/\d|\d-\d\d|week|overnight|b\.?i\.?d|q\.?d",
    ),
    "hours": ("[\\d两二三四五六七八九十半每]个?小时", r"hour|\bhrs?\b|\d ?h\b|/h|overnight"),
    "minutes": (r"[\d两二三四五六七八九十半每]分钟", r"min|half an hour|quarter"),
}
INVENTED = {
    unit: (
        re.compile(zh),
        re.compile(
            en,
            re.IGNORECASE
            if unit in ("years", "months", "weeks", "days", "hours", "minutes")
            else 0,
        ),
    )
    for unit, (zh, en) in INVENTED.items()
}
WORD_NUMBERS = {
    word: n
    for n, words in enumerate(
        (
            "zero",
            "one first once single i january mono uni",
            "two twice both pair double ii february bi di dual second",
            "three third thirds triple thrice iii march tri",
            "four fourth iv april quadr tetra quarter",
            "five fifth v may penta",
            "six sixth vi june hexa",
            "seven seventh vii july",
            "eight eighth viii august octa",
            "nine ninth ix september",
            "ten tenth x october",
            "eleven eleventh xi november",
            "twelve twelfth dozen xii december",
            "thirteen thirteenth",
            "fourteen fourteenth",
            "fifteen fifteenth",
            "sixteen sixteenth",
            "seventeen seventeenth",
            "eighteen eighteenth",
            "nineteen nineteenth",
            "twenty twentieth",
        )
    )
    for word in words.split()
}
WORD_NUMBERS |= {
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
    "hundred": 100,
    "thousand": 1000,
    "half": 50,
    "quarter": 25,
}
SAID_NUMBERS = {
    word: n
    for words, n in (
        ("two twice", 2),
        ("three third thirds triple thrice", 3),
        ("four fourth", 4),
        ("five fifth", 5),
        ("six sixth", 6),
        ("seven seventh", 7),
        ("eight eighth", 8),
        ("nine ninth", 9),
        ("ten tenth", 10),
        ("twelve", 12),
    )
    for word in words.split()
}  # words that a translation says as a number, too
ROMAN = {"II": 2, "III": 3, "IV": 4, "VI": 6, "VII": 7, "VIII": 8, "IX": 9}
SCALES_EN = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
SCALES_ZH = {"百": 100, "千": 1000, "万": 10**4, "百万": 10**6, "亿": 10**8}
DIGITS_ZH = {c: n for n, c in enumerate("零一二三四五六七八九")} | {
    "两": 2,
    "〇": 0,
    "双": 2,
    "单": 1,
}
WIDE = str.maketrans(
    {
        **{chr(0xFF10 + n): str(n) for n in range(10)},
        **{c: f"^{n}" for n, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
        "．": ".",
        "·": ".",
        "％": "%",
        "Ⅰ": "I",
        "Ⅱ": "II",
        "Ⅲ": "III",
        "Ⅳ": "IV",
        "Ⅴ": "V",
        "Ⅵ": "VI",
    }
)


def plain_number(text):
    """A number as it is compared: 1,200 and 1200.0 are 1200."""
    try:
        text = text.replace(",", "").rstrip(".")
        return (
            Decimal(text).normalize() if len(text) < 20 else Decimal(text_key(text))
        )  # no measurement, but to be compared like one
    except InvalidOperation:
        return Decimal(0)


def chinese_numbers(text):
    """The values that Chinese numerals in a text say (runs above 12 characters are none): 十二 is 12, 三十五 is 35, 一百二十 is 120, and each digit of 二〇一九."""
    values = set()
    for run in re.findall("[零〇一二三四五六七八九两双单十百千万亿]++", text):
        if len(run) > 12:
            continue
        total = section = digit = 0
        for c in run:
            values |= {Decimal(DIGITS_ZH[c])} if c in DIGITS_ZH else set()
            if c in DIGITS_ZH:
                digit = DIGITS_ZH[c]
            elif c in "十百千":
                section, digit = section + (digit or 1) * {"十": 10, "百": 100, "千": 1000}[c], 0
            else:
                total, section, digit = (
                    total + (section + digit or 1) * {"万": 10**4, "亿": 10**8}[c],
                    0,
                    0,
                )
        values |= {
            Decimal(total + section + digit),
            Decimal(int("".join(str(DIGITS_ZH[c]) for c in run if c in DIGITS_ZH) or 0)),
        }
    return {value.normalize() for value in values}


def numbers_differ(english, chinese):
    """The numbers, as text, that only one side has, or "". Words (three, 三, May, II) may stand for digits on the other side."""
    english = re.sub(
        r"(?<=[x\u00d7] 10)(?=[3-9]\b|1[0-2]\b)", "^", english.translate(WIDE)
    )  # 10 9/L, its exponent no longer raised
    chinese = chinese.translate(WIDE)
    decades = re.findall(r"\b(\d\d)(\d0)s\b", english)  # the 1990s are 20世纪90年代
    english_digits = re.sub(r"\b\d\d\d0s\b", " ", english)

    def found(text, scales):
        pattern = "|".join(sorted(scales, key=len, reverse=True))
        return {
            (plain_number(n) * scales.get(scale.lower(), 1)).normalize()
            for n, scale in re.findall(
                rf"(\d++(?:,\d{{3}})*+(?:\.\d++)?+)\s*+((?:{pattern})(?!分))?", text, re.IGNORECASE
            )
        }

    in_english, in_chinese = found(english_digits, SCALES_EN), found(chinese, SCALES_ZH)
    words = re.findall(r"[a-z]+", english.lower())
    allowed = {Decimal(WORD_NUMBERS[w]) for w in words if w in WORD_NUMBERS}
    allowed |= {
        a + b for a in allowed for b in allowed if a >= 20 and 0 < b < 10 and a % 10 == 0
    }  # thirty-five
    allowed |= {
        Decimal(n)
        for century, decade in decades
        for n in (int(century) + 1, int(decade), int(century + decade))
    }
    said = (
        {Decimal(SAID_NUMBERS[w]) for w in words if w in SAID_NUMBERS}
        if not re.search(r"ty\b|hundred|thousand|million", english)
        else set()
    )  # not the five of thirty-five
    roman = {
        token for token in re.findall(r"(?<![A-Za-z])[IVX]+(?![A-Za-z])", english) if token in ROMAN
    }
    spoken = chinese_numbers(chinese) | {
        Decimal(n)
        for token, n in ROMAN.items()
        if re.search(rf"(?<![A-Za-z]){token}(?![A-Za-z])", chinese)
    }
    missing = in_english - in_chinese - spoken | said - in_chinese - spoken
    missing |= (
        {
            Decimal(ROMAN[token])
            for token in roman
            if not re.search(rf"(?<![A-Za-z]){token}(?![A-Za-z])", chinese)
        }
        - in_chinese
        - spoken
    )
    invented = in_chinese - in_english - {number.normalize() for number in allowed}
    raw = (
        {plain_number(n) for n in re.findall(r"\d+(?:\.\d+)?", english)} if invented else set()
    )  # 2 hundred, said as 2 and 百
    panels = {
        label
        for label in re.findall(r"\b\d+[A-H]\b", english)
        if label.lower() not in chinese.lower()
    }  # Figure 2A
    return ", ".join([*(f"{n:f}" for n in sorted(missing | (invented - raw))), *sorted(panels)])


def units_differ(english, chinese):
    """The units that only one side has, or ""."""
    chinese = chinese.translate(WIDE)
    wrong = [
        unit
        for unit in UNITS
        if UNIT_EN[unit].search(english) and not UNIT_ZH[unit].search(chinese)
    ]
    return ", ".join(
        dict.fromkeys(
            wrong
            + [
                unit
                for unit, (zh, en) in INVENTED.items()
                if zh.search(chinese) and not en.search(english)
            ]
        )
    )


def sides_differ(english, chinese):
    """left, right or bilateral when one side has it and the other has not, or has them in another order; "" otherwise."""
    english, chinese = (
        LEFT_VERB.sub(" ", english),
        SIDE_IDIOM.sub(lambda m: "两" if m[0] == "左右" else " ", chinese),
    )
    for side, (words, others, char) in SIDES.items():
        said, translated = len(re.findall(words, english, re.IGNORECASE)), chinese.count(char)
        if bool(said) != bool(translated) and not (translated and re.search(others, english)):
            return side
    order = "".join(
        "左" if word.lower() == "left" else "右"
        for word in re.findall(r"\b(left|right)\b", english, re.IGNORECASE)
    )
    order_zh = "".join(re.findall("[左右]", chinese))
    if (
        sorted(order) == sorted(order_zh)
        and order == order_zh.translate(str.maketrans("左右", "右左")) != order_zh
    ):
        return "left and right swapped"
    if re.search(r"\bbilateral", english, re.IGNORECASE) and not re.search("[双两二各]", chinese):
        return "bilateral"
    if re.search("双侧|两侧", chinese) and not re.search(
        r"bilateral|\bboth\b|\btwo\b|\beither\b|\beach\b|side|symmetr|\bpair|lateral|bi",
        english,
        re.IGNORECASE,
    ):
        return "bilateral"
    return ""


def negation_differs(english, chinese):
    """True when the translation has fewer negations than the original, or more than the original can have, or 阳性 for negative."""
    english = re.sub(
        r"\bnon-?(?:contrast|enhanced|small|steroidal)\b|\bnot only\b|\bnot\b(?=[^.]{0,80}\buntil\b)",
        " ",
        english,
        flags=re.IGNORECASE,
    )
    english = re.sub(r"\b(neither\b[^.]{0,80}?)\bnor\b", r"\1 ", english, flags=re.IGNORECASE)
    chinese = NO_NEGATION_ZH.sub(
        " ",
        chinese.replace("正常", " ") if re.search(r"\bnormal", english, re.IGNORECASE) else chinese,
    )
    if len(NOT_ZH.findall(chinese)) < len(NOT_EN.findall(english)) + len(
        SOFT_NOT_EN.findall(english)
    ):
        return True
    if len(SURE_NOT_ZH.findall(chinese)) > len(MAYBE_NOT_EN.findall(english)):
        return True
    positive, negative = (
        len(re.findall(word, english, re.IGNORECASE)) for word in ("positiv", "negativ")
    )
    return bool(negative) and chinese.count("阳性") > positive and chinese.count("阴性") < negative


def is_repetitive(text):
    """A phrase four times in a row, a character ten times, or a long text of few different phrases."""
    if re.search(r"(.{3,40}?)\1{3,}|([^\W\d_])\2{9,}", text):
        return True
    grams = [text[i : i + 4] for i in range(len(text) - 3)]
    return len(grams) > 80 and len(set(grams)) * 3 < len(grams)


def glossary_breaks(english, chinese, glossary):
    """English terms of the glossary that a text holds and whose Chinese the translation lacks."""
    broken, rest = [], english
    for (
        term,
        accepted,
        pattern,
    ) in glossary:  # longest first: "left ventricle" hides the "ventricle" in it
        if pattern.search(rest):
            rest = pattern.sub(" ", rest)
            broken += [] if any(word in chinese for word in accepted) else [term]
    return broken


def quality(english, chinese, glossary=()):
    """Why the translation of a row is not good enough: ["reason: field, detail"], [] when every rule passes. english, chinese: {field: text}."""
    reasons = []
    for name, source in english.items():
        text = chinese.get(name, "")
        if not text.strip():
            reasons.append(f"empty: {name}")
            continue
        if len(text) > 3 * len(source) + 200:
            reasons.append(f"length ratio: {name}, {len(text) / len(source):.2f}")
            continue
        letters = re.sub(r"\s", "", source)
        if (WORD.search(source) and not CJK.search(text)) or (
            OTHER_SCRIPT.search(text) and not OTHER_SCRIPT.search(source)
        ):
            reasons.append(f"Chinese share: {name}, {chinese_share(text):.0%}")
        elif is_untranslated(text) and not (
            CJK.search(text) and len(source.split()) <= 3
        ):  # Candida auris (耳念珠菌) is well translated
            reasons.append(f"Chinese share: {name}, {chinese_share(text):.0%}")
        elif (
            len(letters) >= 20
            and not (0.08 if len(source) < 150 else 0.17)
            < len(text) / len(source)
            < (1.2 if len(source) < 40 else 0.9 if len(source) < 150 else 0.55)
            and chinese_share(source) < 0.3
            and source not in text
        ):
            reasons.append(f"length ratio: {name}, {len(text) / len(source):.2f}")
        if detail := numbers_differ(source, text):
            reasons.append(f"numbers: {name}, {detail}")
        if detail := units_differ(source, text):
            reasons.append(f"units: {name}, {detail}")
        if detail := sides_differ(source, text):
            reasons.append(f"laterality: {name}, {detail}")
        if negation_differs(source, text):
            reasons.append(f"negation: {name}")
        if (found := REFUSAL.search(text)) and not REFUSAL.search(source):
            reasons.append(f"refusal: {name}, {found[0]}")
        if (found := LEFTOVER.search(text)) and not LEFTOVER.search(source):
            reasons.append(f"leftover: {name}, {found[0]}")
        if is_repetitive(text) and not is_repetitive(source):
            reasons.append(f"repeated text: {name}")
        if broken := glossary_breaks(source, text, glossary):
            reasons.append(f"glossary: {name}, {', '.join(broken)}")
    return reasons


def reason_name(reason):
    return reason.split(":")[0]


def read_glossary(path, encoding="utf-8"):
    """[(English, accepted Chinese words, pattern)], longest first, of a table with English and Chinese in its first two columns (`a|b`: either will do)."""
    if path is None:
        return []
    records, glossary = Records(path, encoding), []
    if len(records.columns or ()) < 2:
        raise ValueError(
            f"{path}: a glossary is a .csv or .tsv with two columns, English and Chinese, and a header"
        )
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
        glossary.append(
            (
                english,
                accepted,
                re.compile(
                    rf"(?<![A-Za-z]){re.escape(english)}(?:e?s)?(?![A-Za-z])", re.IGNORECASE
                ),
            )
        )
    return sorted(glossary, key=lambda term: -len(term[0]))

"""How good a model is, on a whole test set and with intervals; several systems side by side; doctors' rankings.

    python evaluate.py FILE --images DIR --model DIR --out OUT            PMC-VQA, SLAKE, VQA-RAD, dialogs or your own; one Markdown and JSON report
    python evaluate.py FILE … --quantize int8                            the same in 8 bits, and what that changes
    python evaluate.py compare FILE --images DIR --system A=DIR --system B=https://host/v1#model --out OUT    Figure 4: the same questions to several systems
    python evaluate.py rank OUT ranking.csv …                            what doctors ranked blind on compare's page: win rates with intervals

Every question is asked again with the picture withheld (an even grey in its place): what a model scores then, it did not see. Beside both
stands what the best constant answer scores. Answers are greedy. OUT holds predictions.jsonl, which a run that is started again goes on from,
report.json and report.md. Intervals: 95 %, bootstrap over pictures, since questions about one picture are not independent.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from chimed.prompts import CHOICES
from common.files import (
    USER_ERRORS,
    check_ranges,
    model_folder,
    one_line,
    run_cli,
    write_json,
    write_text,
)
from common.intervals import bootstrap
from common.text import CJK
from model_io.options import add_model_flags, model_from_flags
from model_io.pixels import PAD_COLOR, preprocess_image
from model_io.tokens import encode_prompt
from qilin_min import KVCache, answer_ids, pad_rows
from testsets import read_testset

GREY = Image.new("RGB", (8, 8), PAD_COLOR)  # almost 0 once normalised
CHOOSE = {"Chinese": CHOICES[0], "English": "Choose the right answer from the following options."}  # what precedes the options: the form of data_prep.py build --choices

# --- 1. what an answer is worth -------------------------------------------------------------------------------------


def normalise(text):
    """What exact match compares: full-width forms and case unified, blanks and the closing stop dropped."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".。")


def words(text):
    """What F1, BLEU and ROUGE count: a Chinese character, a Latin word, a number; case and punctuation dropped."""
    return re.findall(rf"{CJK.pattern}|[^\W_]+?(?={CJK.pattern}|[\W_]|$)", unicodedata.normalize("NFKC", text).casefold())


def token_f1(answer, truth):
    """Harmonic mean of precision and recall of the words, each counted as often as it occurs (SQuAD, arXiv 1606.05250)."""
    a, t = Counter(words(answer)), Counter(words(truth))
    common = (a & t).total()
    return 2 * common / (a.total() + t.total()) if common else float(not a and not t)


class Words:
    """For rouge-score, whose own tokenizer knows Latin letters only."""
    tokenize = staticmethod(words)


def text_metrics():
    """{name: function of (answer, truth) -> row of numbers}, and how rows are put together: BLEU adds up what n-grams agree, the others are averaged."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU
    except ImportError:
        print("BLEU and ROUGE-L are left out: pip install sacrebleu rouge-score", file=sys.stderr)
        return None
    rouge = RougeScorer(["rougeL"], tokenizer=Words())
    bleu = BLEU(tokenize="none", effective_order=True)

    def rouge_l(answer, truth):
        return rouge.score(truth, answer)["rougeL"].fmeasure

    def ngrams(answer, truth):
        """(10,): length of answer and truth, n-grams that agree and n-grams, n = 1 to 4."""
        s = bleu.sentence_score(" ".join(words(answer)), [" ".join(words(truth))])
        return [s.sys_len, s.ref_len, *s.counts, *s.totals]

    def corpus_bleu(total, order):
        return BLEU.compute_bleu(total[2 : 2 + order].tolist(), total[6 : 6 + order].tolist(), int(total[0]), int(total[1]), smooth_method="exp", max_ngram_order=order).score / 100

    return rouge_l, ngrams, corpus_bleu


ALONE = r"(?![A-Za-z0-9])(?!\s*[、,/&和或及]\s*[A-D](?![A-Za-z\u4e00-\u9fff]))"  # a letter that begins no word and is not one of two
NAMED = re.compile(r"(?:the |my |so |我|本题|正确|最佳|应该?|因此|所以|correct |right |best )*(?:answer|option|choice|答案|选项|选择|选)(?: is|应?[是为])?[\s:(\[*\"'“]*([A-D])" + ALONE, re.IGNORECASE)
ALONE_IN_FRONT = re.compile(r"[\s(\[*\"'“]*([A-D])(?=\s*(?:$|[.:)\]、,。;*\"'”\n])|\s+(?:is|because|since)\b)" + ALONE, re.IGNORECASE)


def read_choice(text, choices):
    """The letter that a generated answer means, or "" when it cannot be told: an option's text, a letter in front, or the one option that occurs in it."""
    text = unicodedata.normalize("NFKC", text).strip()
    for letter, option in choices.items():
        if normalise(text) == normalise(option):
            return letter
    match = NAMED.match(text) or ALONE_IN_FRONT.match(text)
    if match and match[1].upper() in choices and (match[1].isupper() or len(text) <= 3):
        return match[1].upper()
    plain, inside = " ".join(text.casefold().split()), []
    for letter, option in choices.items():
        option = " ".join(unicodedata.normalize("NFKC", option).casefold().split()).rstrip(".。")
        if re.search(rf"(?<![a-z0-9]){re.escape(option)}(?![a-z0-9])" if option.isascii() else re.escape(option), plain):  # no is not in abnormal, nor CT in fracture
            inside.append((letter, option))
    inside = [letter for letter, option in inside if not any(option != other and option in other for _, other in inside)]
    return inside[0] if len(inside) == 1 else ""


# --- 2. asking ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prefill(model, prompts, pixels, room):
    """(cache, log-probabilities (B, V) of the first word, lengths (B,)): all prompts and pictures computed once, with room for more tokens."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    limit = model.config.text.max_position_embeddings
    cache = KVCache(model.config.text.num_hidden_layers, min(int(lengths.max()) + room, limit))
    logits = model(pad_rows(prompts, 0).to(device), None if pixels is None else pixels.to(device), cache=cache, lengths=lengths)  # (B, V)
    return cache, logits.log_softmax(-1), lengths


@torch.no_grad()
def log_likelihoods(model, cache, first, lengths, answers):
    """Sum of log-probabilities of each row's answer (lists of int, one a row, each ending in </s>) after its prompt; the cache is as before.

    What lies beyond the model's positions is not counted: -> (sums, numbers of tokens counted).
    """
    room = [min(len(a), cache.max_length - int(n)) for a, n in zip(answers, lengths)]
    answers = [a[: max(1, n)] for a, n in zip(answers, room)]
    ids = pad_rows(answers, 0).to(first.device)  # (B, T)
    found = [first.gather(1, ids[:, :1])]  # the first word follows from the prompt
    if ids.shape[1] > 1:
        hidden = model.model(model.model.embed_tokens(ids[:, :-1]), cache)  # (B, T - 1, C)
        found.append(torch.stack([model.logits(h).log_softmax(-1).gather(1, i[1:, None])[:, 0] for h, i in zip(hidden, ids)]))  # a row at a time: (T - 1, V)
        cache.truncate(lengths)
    found = torch.cat(found, 1).cpu()  # (B, T)
    return [float(row[: len(a)].sum()) for row, a in zip(found, answers)], [len(a) for a in answers]


def with_options(question):
    """The question with its options listed, as data_prep.py build --choices writes it."""
    return "\n".join([question.question, CHOOSE[question.language], *(f"{letter}. {text}" for letter, text in question.choices.items())])


def encode_question(question, tokenizer, config, options=False):
    conversation = [*question.conversation[:-1], {"from": "human", "value": with_options(question)}] if options else question.conversation
    return encode_prompt(conversation, tokenizer, config.n_image_tokens, n_images=question.n_images)


def ask(model, tokenizer, batch, pixels, max_new_tokens):
    """What the model says to a batch of questions, one dict each: the open answer, the likelihood of the truth and of each option, the answer when options are shown."""
    config = model.config
    prompts = [encode_question(question, tokenizer, config) for question in batch]
    # each candidate of a row scored in turn on the same keys and values: the truth, then its options
    texts = [[question.truth, *question.choices.values()] for question in batch]
    candidates = [[tokenizer.encode(text) + [tokenizer.eos_id] for text in row] for row in texts]
    cache, first, lengths = prefill(model, prompts, pixels, max(max_new_tokens, *(len(c) for row in candidates for c in row)))
    said = [{"likelihood": []} for _ in batch]
    for k in range(max(map(len, candidates))):
        for row, total, n in zip(said, *log_likelihoods(model, cache, first, lengths, [row[k] if k < len(row) else [tokenizer.eos_id] for row in candidates])):
            row["likelihood"].append([round(total, 4), n])
    cache.truncate(lengths - 1)  # the last token of each prompt is run once more, for its logits
    for row, ids, question in zip(said, answer_ids(model, prompts, cache=cache, max_new_tokens=max_new_tokens), batch):
        row["answer"] = tokenizer.decode(ids)
        row["likelihood"] = row["likelihood"][: 1 + len(question.choices)]
    places = [i for i, question in enumerate(batch) if question.choices]
    if places:
        starts = np.cumsum([0, *(len(question.pictures) for question in batch)])
        mine = [p for i in places for p in range(starts[i], starts[i + 1])]
        prompts = [encode_question(batch[i], tokenizer, config, options=True) for i in places]
        for i, ids in zip(places, answer_ids(model, prompts, pixels[mine] if mine else None, max_new_tokens=max_new_tokens)):
            said[i]["choice_answer"] = tokenizer.decode(ids)
    return said


def judge(question, said):
    """Scores of one answer by name, as numbers."""
    scores = {"exact match": float(normalise(said["answer"]) == normalise(question.truth)), "token F1": token_f1(said["answer"], question.truth)}
    if question.choices:
        letters, pairs = list(question.choices), said["likelihood"][1:]
        scores["choice by likelihood"] = float(letters[max(range(len(letters)), key=lambda i: pairs[i][0] / pairs[i][1])] == question.letter)
        scores["choice by likelihood, summed"] = float(letters[max(range(len(letters)), key=lambda i: pairs[i][0])] == question.letter)
        scores["choice by answer"] = float(read_choice(said["choice_answer"], question.choices) == question.letter)
    return scores


def answer_file(args, questions, model, tokenizer, path):
    """{row: {"seen": …, "blind": …}} of all questions, from `path` as far as they are there, then from the model, written as they come."""
    done = {}
    if path.is_file():
        whole = [line for line in path.read_bytes().split(b"\n")[:-1]]  # what follows the last newline was being written when the run ended
        done = {row["row"]: row for row in map(json.loads, whole)}
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done.values()))
    todo = [i for i in range(len(questions)) if i not in done]
    size, mode, right = model.config.vision.image_size, model.config.image_mode, [judge(questions[i], row["seen"]) for i, row in done.items() if "seen" in row]

    def headline():
        name = "choice by likelihood" if right and "choice by likelihood" in right[-1] else "exact match"
        values = [scores[name] for scores in right if name in scores]
        return f"{name} {sum(values) / len(values):.1%}" if values else ""

    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(questions), initial=len(done), desc="asking", unit="q", disable=None) as bar:
        for start in range(0, len(todo), args.batch_size):
            numbers, pixels = [], []
            for i in todo[start : start + args.batch_size]:
                try:
                    pixels += [preprocess_image(picture, size, mode) for picture in questions[i].pictures]
                    numbers.append(i)
                except USER_ERRORS as error:
                    if not args.skip_bad:
                        raise ValueError(f"{args.file}: question {questions[i].id}: {one_line(error)} (--skip-bad leaves such rows out)") from None
                    pixels = pixels[: sum(len(questions[j].pictures) for j in numbers)]
                    done[i] = {"row": i, "id": questions[i].id, "left_out": one_line(error)}
                    file.write(json.dumps(done[i], ensure_ascii=False) + "\n")
            batch = [questions[i] for i in numbers]
            bar.update(len(todo[start : start + args.batch_size]))
            if not batch:
                continue
            pixels = torch.stack(pixels) if pixels else None  # (M, 3, H, W)
            grey = None if pixels is None else preprocess_image(GREY, size, mode).expand(len(pixels), -1, -1, -1)
            seen, blind = (ask(model, tokenizer, batch, p, args.max_new_tokens) for p in (pixels, grey))
            for i, question, s, b in zip(numbers, batch, seen, blind):
                row = {"row": i, "id": question.id, **question.kinds, "image": [p.name for p in question.pictures], "question": question.question, "truth": question.truth,
                       **({"choices": question.choices, "letter": question.letter} if question.choices else {}), "seen": s, "blind": b}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                done[i] = row
                right.append(judge(question, s))
            file.flush()
            bar.set_postfix_str(headline())
    return done


# --- 3. the report --------------------------------------------------------------------------------------------------


def table_of(questions, rows, metrics, constants):
    """{score: {n, value, low, high, withheld, withheld_low, withheld_high, constant}} of some questions, `rows` their answers, `constants` what constant_answers gives them."""
    pictures = {name: k for k, name in enumerate(dict.fromkeys(str(q.pictures[0]) if q.pictures else f"row {i}" for i, q in enumerate(questions)))}
    cluster = np.array([pictures[str(q.pictures[0]) if q.pictures else f"row {i}"] for i, q in enumerate(questions)])
    judged = {"value": [judge(q, row["seen"]) for q, row in zip(questions, rows)], "withheld": [judge(q, row["blind"]) for q, row in zip(questions, rows)],
              "constant": [{"exact match": float(normalise(c) == normalise(q.truth)), "token F1": token_f1(c, q.truth)} for q, c in zip(questions, constants)]}
    answers = {"value": [row["seen"]["answer"] for row in rows], "withheld": [row["blind"]["answer"] for row in rows], "constant": constants}
    best = max(Counter(q.letter for q in questions if q.choices).values(), default=0)
    table = {}

    def add(name, column, numbers, combine, which):
        """One cell: numbers (n, K) of the questions `which`."""
        sums, counts = np.zeros((len(pictures), numbers.shape[1])), np.bincount(cluster[which], minlength=len(pictures))
        np.add.at(sums, cluster[which], numbers)
        cell = table.setdefault(name, {"n": len(which)})
        cell[column] = float(combine(numbers.sum(0), len(which)))
        if column != "constant":
            prefix = "" if column == "value" else "withheld_"
            cell[f"{prefix}low"], cell[f"{prefix}high"] = bootstrap(sums[counts > 0], counts[counts > 0], combine)

    def mean(totals, n):
        return totals[0] / n

    for column, scores in judged.items():
        for name in ("choice by likelihood", "choice by likelihood, summed", "choice by answer", "exact match", "token F1"):
            which = np.array([i for i, s in enumerate(scores) if name in s], dtype=int)
            if len(which):
                add(name, column, np.array([[scores[i][name]] for i in which]), mean, which)
    for name, cell in table.items():
        if name.startswith("choice"):
            cell["constant"] = best / cell["n"]
    everything = np.arange(len(questions))
    if metrics:
        rouge_l, ngrams, corpus_bleu = metrics
        for column, texts in answers.items():
            add("ROUGE-L", column, np.array([[rouge_l(a, q.truth)] for a, q in zip(texts, questions)]), mean, everything)
            counted = np.array([ngrams(a, q.truth) for a, q in zip(texts, questions)], dtype=float)
            for order in (1, 4) if any(len(words(q.truth)) >= 4 for q in questions) else (1,):
                add(f"BLEU-{order}", column, counted, lambda totals, n, order=order: corpus_bleu(totals, order), everything)
    for column, side in (("value", "seen"), ("withheld", "blind")):
        pairs = np.array([row[side]["likelihood"][0] for row in rows], dtype=float)
        add("perplexity of the truth", column, pairs, lambda totals, n: math.exp(min(700, -totals[0] / totals[1])), everything)
    return table


def constant_answers(questions, label):
    """For each question the commonest truth among those of its language and of its value of `label` (None: of its language), as it is most often written."""
    groups, spelt = defaultdict(Counter), defaultdict(Counter)
    for q in questions:
        groups[q.language, q.kinds.get(label)][normalise(q.truth)] += 1
        spelt[normalise(q.truth)][q.truth] += 1
    return [spelt[groups[q.language, q.kinds.get(label)].most_common(1)[0][0]].most_common(1)[0][0] for q in questions]


def percent(cell, column):
    """A cell of report.md."""
    if column not in cell:
        return ""
    prefix = "" if column == "value" else "withheld_"
    is_share = cell[column] is not None and "perplexity" not in cell
    text = f"{100 * cell[column]:.1f} %" if is_share else f"{cell[column]:.3g}"
    if column == "constant" or cell[f"{prefix}low"] is None:
        return text
    low, high = cell[f"{prefix}low"], cell[f"{prefix}high"]
    return text + (f" ({100 * low:.1f} to {100 * high:.1f})" if is_share else f" ({low:.3g} to {high:.3g})")


def report_lines(report):
    """report.md."""
    lines = [f"# {report['name']}: {report['n']} questions about {report['pictures']} pictures", "",
             f"{report['set']}, {', '.join(f'{n} in {language}' for language, n in report['languages'].items())}; model {report['model']}; answers greedy, at most {report['max_new_tokens']} tokens."
             + "".join(f" Left out: {n} {reason}." for reason, n in report["left_out"].items()), "",
             "| score | n | with the picture (95 %) | picture withheld (95 %) | best constant answer |", "|---|---|---|---|---|"]
    for name, cell in report["scores"].items():
        cell = dict(cell, perplexity=True) if name.startswith("perplexity") else cell
        lines.append(f"| {name} | {cell['n']} | {percent(cell, 'value')} | {percent(cell, 'withheld')} | {percent(cell, 'constant')} |")
    lines += ["", f"The constant answer is the commonest truth of each {report['constant_of']}" + (" and language" if len(report["languages"]) > 1 and report["constant_of"] != "language" else "") + "; of choices the commonest letter."]
    if "unread" in report:
        lines += ["", f"Of the answers to shown options, {report['unread']} of {report['scores']['choice by answer']['n']} name none and count as wrong."]
    for label, groups in report["by"].items():
        lines += ["", f"| {label} | n | {report['headline']} (95 %) | picture withheld (95 %) | best constant answer of its kind |", "|---|---|---|---|---|"]
        lines += [f"| {kind.replace('|', '/')} | {cell['n']} | {percent(cell, 'value')} | {percent(cell, 'withheld')} | {percent(cell, 'constant')} |" for kind, cell in groups.items()]
    if "quantised" in report:
        q = report["quantised"]
        lines += ["", f"{q['bits']} against {q['dtype']}, on {q['n_tokens']} tokens of {q['n']} true answers, decoded one by one: perplexity {q['perplexity_before']:.4f} -> {q['perplexity_after']:.4f}, "
                  f"logits off by {q['logits_off']:.2%} (root mean square), the likeliest word the same for {q['same_first']:.1%}, KL divergence {q['kl']:.2e}."]
    return lines


def write_report(args, kind, questions, left_out, done, quantised):
    metrics = text_metrics()
    left_out = left_out + Counter("picture does not decode" for row in done.values() if "left_out" in row)
    kept = [i for i in range(len(questions)) if "seen" in done.get(i, {})]
    questions, rows = [questions[i] for i in kept], [done[i] for i in kept]
    if not questions:
        raise ValueError(f"{args.file}: no question was left")
    labels = list(dict.fromkeys(label for q in questions for label in q.kinds))
    first = labels[0] if labels else None
    scores = table_of(questions, rows, metrics, constant_answers(questions, first))
    headline = "choice by likelihood" if 2 * scores.get("choice by likelihood", {"n": 0})["n"] > len(questions) else "exact match"
    by, best = {}, scores[headline]
    if len({q.language for q in questions}) > 1:
        labels.append("language")
    for label in labels:
        constants = constant_answers(questions, label)
        groups = defaultdict(list)
        for i, q in enumerate(questions):
            groups[q.language if label == "language" else q.kinds.get(label, "(none)")].append(i)
        tables = {value: table_of([questions[i] for i in group], [rows[i] for i in group], None, [constants[i] for i in group]) for value, group in sorted(groups.items())}
        by[label] = {value: table[headline] for value, table in tables.items() if headline in table}
    report = {"name": Path(args.file).name, "file": str(args.file), "set": kind, "model": args.model or args.llm, "quantize": args.quantize, "max_new_tokens": args.max_new_tokens, "n": len(questions),
              "pictures": len({p for q in questions for p in q.pictures}), "languages": Counter(q.language for q in questions), "left_out": left_out,
              "constant_of": first or "language", "headline": headline, "accuracy": best["value"], "blind": best["withheld"], "constant": best["constant"], "scores": scores, "by": by}
    if any(q.choices for q in questions):
        report["unread"] = sum(not read_choice(row["seen"]["choice_answer"], q.choices) for q, row in zip(questions, rows) if q.choices)
    if quantised:
        report["quantised"] = quantised
    write_json(args.out / "report.json", report)
    write_text(args.out / "report.md", "\n".join(report_lines(report)) + "\n")
    print("\n".join(report_lines(report)))


# --- 4. what quantising changes -------------------------------------------------------------------------------------


def true_logits(model, prompts, answers, pixels):
    """Logits float32 (n, V), on the CPU, that follow a batch's prompts and true answers, one token at a time as generate() decodes, which is where int8 computes otherwise; and the ids (n,)."""
    cache, logits, _ = prefill(model, prompts, pixels, max(map(len, answers)))
    steps = [logits]
    for t in range(min(max(map(len, answers)), cache.max_length - max(map(len, prompts))) - 1):
        ids = torch.tensor([[a[min(t, len(a) - 1)]] for a in answers], device=logits.device)
        steps.append(model(ids, cache=cache, lengths=torch.ones(len(answers), dtype=torch.int64, device=logits.device)))
    steps = torch.stack(steps, 1).float().cpu()  # (B, T, V)
    return torch.cat([row[: len(a)] for row, a in zip(steps, answers)]), torch.tensor([i for a in answers for i in a[: len(steps[0])]])


@torch.no_grad()
def quantised_change(args, questions, model, tokenizer, n=64):
    """What --quantize does to the logits of the first n true answers, against the same weights as they are; both are in memory for it."""
    plain = model_from_flags(argparse.Namespace(**{**vars(args), "quantize": None, "compile": False}))[0]
    questions, total = questions[:n], defaultdict(float)
    for start in tqdm(range(0, len(questions), args.batch_size), desc=f"{args.quantize} against plain", unit="batch", disable=None):
        batch = questions[start : start + args.batch_size]
        pixels = [preprocess_image(p, model.config.vision.image_size, model.config.image_mode) for q in batch for p in q.pictures]
        prompts, answers = [encode_question(q, tokenizer, model.config) for q in batch], [tokenizer.encode(q.truth) + [tokenizer.eos_id] for q in batch]
        (before, ids), (after, _) = (true_logits(m, prompts, answers, torch.stack(pixels) if pixels else None) for m in (plain, model))
        off, centred = (x - x.mean(-1, keepdim=True) for x in (after - before, before))  # a constant added to all changes nothing
        total["off"] += float(off.square().sum())
        total["size"] += float(centred.square().sum())
        before, after = before.log_softmax(-1), after.log_softmax(-1)
        total["n"] += len(ids)
        total["before"] -= float(before.gather(1, ids[:, None]).sum())
        total["after"] -= float(after.gather(1, ids[:, None]).sum())
        total["same"] += int((before.argmax(-1) == after.argmax(-1)).sum())
        total["kl"] += float((before.exp() * (before - after)).sum())
    n = total["n"]
    return {"bits": args.quantize, "dtype": str(next(plain.parameters()).dtype).removeprefix("torch."), "n": len(questions), "n_tokens": int(n), "perplexity_before": math.exp(total["before"] / n),
            "perplexity_after": math.exp(total["after"] / n), "logits_off": math.sqrt(total["off"] / total["size"]), "same_first": total["same"] / n, "kl": total["kl"] / n}


# --- 5. main --------------------------------------------------------------------------------------------------------


def settings_of(args, questions):
    """What predictions depend on, kept beside them: a run that differs must not go on from them."""
    asked = [(q.id, q.conversation, q.truth, [str(p) for p in q.pictures], q.choices, q.letter) for q in questions]
    paths = [p for p in (args.model, args.llm, args.vision, args.projector) if p and p != "fresh"]
    own = {"run.json", "report.json"}  # of an --out that is the model's folder
    files = [f for p in map(model_folder, paths) for f in (sorted(p.iterdir()) if p.is_dir() else [p]) if f.suffix in (".safetensors", ".bin", ".json", ".model") and f.name not in own]
    weights = hashlib.sha256(repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]).encode()).hexdigest()[:16]
    return {"questions": hashlib.sha256(repr(asked).encode("utf-8", "backslashreplace")).hexdigest()[:16], "images": os.path.realpath(args.images), "weights": weights, "dtype": args.dtype,
            "quantize": args.quantize, "max_new_tokens": args.max_new_tokens}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="PMC-VQA .csv, SLAKE or VQA-RAD .json, dialogs, or your own image, question, answer")
    parser.add_argument("--images", required=True, help="folder that picture names are relative to")
    parser.add_argument("--out", type=Path, required=True, help="folder for predictions.jsonl, report.json, report.md")
    parser.add_argument("--n", type=int, default=None, metavar="N", help="only N questions, drawn by --seed (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="questions asked at a time (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be asked, and count them in the report, instead of stopping at the first")
    parser.add_argument("--encoding", default="utf-8", help="of a table that is not UTF-8, e.g. gb18030")
    parser.add_argument("--restart", action="store_true", help="throw away the answers that --out holds of another run")
    add_model_flags(parser)
    args = parser.parse_args()
    check_ranges(args, batch_size=(1, 10**6), max_new_tokens=(1, 10**6), n=(1, 10**9), seed=(0, 2**63 - 1))
    return args


def evaluate():
    args = parse_args()
    kind, questions, left_out = read_testset(args.file, args.images, args.skip_bad, args.encoding)
    if args.n and args.n < len(questions):
        questions = [questions[i] for i in sorted(np.random.default_rng(args.seed).choice(len(questions), args.n, replace=False))]
    model, tokenizer, _ = model_from_flags(args)
    limit, fitting = model.config.text.max_position_embeddings, []
    for question in questions:
        n = len(encode_question(question, tokenizer, model.config, options=bool(question.choices)))
        if n < limit:
            fitting.append(question)
        elif args.skip_bad:
            left_out["question beyond the model's positions"] += 1
        else:
            raise ValueError(f"{args.file}: row {question.id}: the question takes {n} tokens, the model's positions end at {limit} (--skip-bad leaves such rows out)")
    questions = fitting
    settings, path = settings_of(args, questions), args.out / "predictions.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    run = args.out / "run.json"
    if args.restart:
        path.unlink(missing_ok=True)
    elif path.is_file() and (not run.is_file() or json.loads(run.read_text()) != settings):
        raise ValueError(f"{args.out} holds answers of another run (other questions, pictures, weights or options): give another --out, or --restart to throw them away")
    write_json(run, settings)
    done = answer_file(args, questions, model, tokenizer, path)
    write_report(args, kind, questions, left_out, done, quantised_change(args, [questions[i] for i in sorted(done) if "seen" in done[i]], model, tokenizer) if args.quantize else None)


def main():
    if sys.argv[1:2] in (["compare"], ["rank"]):
        import compare
        compare.main()
    else:
        evaluate()


if __name__ == "__main__":
    run_cli(main)

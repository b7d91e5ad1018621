"""The scores of a run as a table, a report, JSON."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from common.files import write_json, write_text
from common.intervals import bootstrap
from evaluation.scores import judge, normalise, read_choice, text_metrics, token_f1, words


def table_of(questions, rows, metrics, constants):
    """{score: {n, value, low, high, withheld, withheld_low, withheld_high, constant}} of some questions, `rows` their answers, `constants` what constant_answers gives them."""
    pictures = {
        name: k
        for k, name in enumerate(
            dict.fromkeys(
                str(q.pictures[0]) if q.pictures else f"row {i}" for i, q in enumerate(questions)
            )
        )
    }
    cluster = np.array(
        [
            pictures[str(q.pictures[0]) if q.pictures else f"row {i}"]
            for i, q in enumerate(questions)
        ]
    )
    judged = {
        "value": [judge(q, row["seen"]) for q, row in zip(questions, rows)],
        "withheld": [judge(q, row["blind"]) for q, row in zip(questions, rows)],
        "constant": [
            {
                "exact match": float(normalise(c) == normalise(q.truth)),
                "token F1": token_f1(c, q.truth),
            }
            for q, c in zip(questions, constants)
        ],
    }
    answers = {
        "value": [row["seen"]["answer"] for row in rows],
        "withheld": [row["blind"]["answer"] for row in rows],
        "constant": constants,
    }
    best = max(Counter(q.letter for q in questions if q.choices).values(), default=0)
    table = {}

    def add(name, column, numbers, combine, which):
        """One cell: numbers (n, K) of the questions `which`."""
        sums, counts = (
            np.zeros((len(pictures), numbers.shape[1])),
            np.bincount(cluster[which], minlength=len(pictures)),
        )
        np.add.at(sums, cluster[which], numbers)
        cell = table.setdefault(name, {"n": len(which)})
        cell[column] = float(combine(numbers.sum(0), len(which)))
        if column != "constant":
            prefix = "" if column == "value" else "withheld_"
            cell[f"{prefix}low"], cell[f"{prefix}high"] = bootstrap(
                sums[counts > 0], counts[counts > 0], combine
            )

    def mean(totals, n):
        return totals[0] / n

    for column, scores in judged.items():
        for name in (
            "choice by likelihood",
            "choice by likelihood, summed",
            "choice by answer",
            "exact match",
            "token F1",
        ):
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
            add(
                "ROUGE-L",
                column,
                np.array([[rouge_l(a, q.truth)] for a, q in zip(texts, questions)]),
                mean,
                everything,
            )
            counted = np.array([ngrams(a, q.truth) for a, q in zip(texts, questions)], dtype=float)
            for order in (1, 4) if any(len(words(q.truth)) >= 4 for q in questions) else (1,):
                add(
                    f"BLEU-{order}",
                    column,
                    counted,
                    lambda totals, n, order=order: corpus_bleu(totals, order),
                    everything,
                )
    for column, side in (("value", "seen"), ("withheld", "blind")):
        pairs = np.array([row[side]["likelihood"][0] for row in rows], dtype=float)
        add(
            "perplexity of the truth",
            column,
            pairs,
            lambda totals, n: math.exp(min(700, -totals[0] / totals[1])),
            everything,
        )
    return table


def constant_answers(questions, label):
    """For each question the commonest truth among those of its language and of its value of `label` (None: of its language), as it is most often written."""
    groups, spelt = defaultdict(Counter), defaultdict(Counter)
    for q in questions:
        groups[q.language, q.kinds.get(label)][normalise(q.truth)] += 1
        spelt[normalise(q.truth)][q.truth] += 1
    return [
        spelt[groups[q.language, q.kinds.get(label)].most_common(1)[0][0]].most_common(1)[0][0]
        for q in questions
    ]


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
    return text + (
        f" ({100 * low:.1f} to {100 * high:.1f})" if is_share else f" ({low:.3g} to {high:.3g})"
    )


def report_lines(report):
    """report.md."""
    lines = [
        f"# {report['name']}: {report['n']} questions about {report['pictures']} pictures",
        "",
        f"{report['set']}, {', '.join(f'{n} in {language}' for language, n in report['languages'].items())}; model {report['model']}; answers greedy, at most {report['max_new_tokens']} tokens."
        + "".join(f" Left out: {n} {reason}." for reason, n in report["left_out"].items()),
        "",
        "| score | n | with the picture (95 %) | picture withheld (95 %) | best constant answer |",
        "|---|---|---|---|---|",
    ]
    for name, cell in report["scores"].items():
        cell = dict(cell, perplexity=True) if name.startswith("perplexity") else cell
        lines.append(
            f"| {name} | {cell['n']} | {percent(cell, 'value')} | {percent(cell, 'withheld')} | {percent(cell, 'constant')} |"
        )
    lines += [
        "",
        f"The constant answer is the commonest truth of each {report['constant_of']}"
        + (
            " and language"
            if len(report["languages"]) > 1 and report["constant_of"] != "language"
            else ""
        )
        + "; of choices the commonest letter.",
    ]
    if "unread" in report:
        lines += [
            "",
            f"Of the answers to shown options, {report['unread']} of {report['scores']['choice by answer']['n']} name none and count as wrong.",
        ]
    for label, groups in report["by"].items():
        lines += [
            "",
            f"| {label} | n | {report['headline']} (95 %) | picture withheld (95 %) | best constant answer of its kind |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {kind.replace('|', '/')} | {cell['n']} | {percent(cell, 'value')} | {percent(cell, 'withheld')} | {percent(cell, 'constant')} |"
            for kind, cell in groups.items()
        ]
    if "quantised" in report:
        q = report["quantised"]
        lines += [
            "",
            f"{q['bits']} against {q['dtype']}, on {q['n_tokens']} tokens of {q['n']} true answers, decoded one by one: perplexity {q['perplexity_before']:.4f} -> {q['perplexity_after']:.4f}, "
            f"logits off by {q['logits_off']:.2%} (root mean square), the likeliest word the same for {q['same_first']:.1%}, KL divergence {q['kl']:.2e}.",
        ]
    return lines


def write_report(args, kind, questions, left_out, done, quantised):
    metrics = text_metrics()
    left_out = left_out + Counter(
        "picture does not decode" for row in done.values() if "left_out" in row
    )
    kept = [i for i in range(len(questions)) if "seen" in done.get(i, {})]
    questions, rows = [questions[i] for i in kept], [done[i] for i in kept]
    if not questions:
        raise ValueError(f"{args.file}: no question was left")
    labels = list(dict.fromkeys(label for q in questions for label in q.kinds))
    first = labels[0] if labels else None
    scores = table_of(questions, rows, metrics, constant_answers(questions, first))
    headline = (
        "choice by likelihood"
        if 2 * scores.get("choice by likelihood", {"n": 0})["n"] > len(questions)
        else "exact match"
    )
    by, best = {}, scores[headline]
    if len({q.language for q in questions}) > 1:
        labels.append("language")
    for label in labels:
        constants = constant_answers(questions, label)
        groups = defaultdict(list)
        for i, q in enumerate(questions):
            groups[q.language if label == "language" else q.kinds.get(label, "(none)")].append(i)
        tables = {
            value: table_of(
                [questions[i] for i in group],
                [rows[i] for i in group],
                None,
                [constants[i] for i in group],
            )
            for value, group in sorted(groups.items())
        }
        by[label] = {value: table[headline] for value, table in tables.items() if headline in table}
    report = {
        "name": Path(args.file).name,
        "file": str(args.file),
        "set": kind,
        "model": args.model or args.llm,
        "quantize": args.quantize,
        "max_new_tokens": args.max_new_tokens,
        "n": len(questions),
        "pictures": len({p for q in questions for p in q.pictures}),
        "languages": Counter(q.language for q in questions),
        "left_out": left_out,
        "constant_of": first or "language",
        "headline": headline,
        "accuracy": best["value"],
        "blind": best["withheld"],
        "constant": best["constant"],
        "scores": scores,
        "by": by,
    }
    if any(q.choices for q in questions):
        report["unread"] = sum(
            not read_choice(row["seen"]["choice_answer"], q.choices)
            for q, row in zip(questions, rows)
            if q.choices
        )
    if quantised:
        report["quantised"] = quantised
    write_json(args.out / "report.json", report)
    write_text(args.out / "report.md", "\n".join(report_lines(report)) + "\n")
    print("\n".join(report_lines(report)))

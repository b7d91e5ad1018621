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
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.files import (
    USER_ERRORS,
    check_ranges,
    model_folder,
    one_line,
    run_cli,
    write_json,
    write_text,
)
from evaluation.asking import ask, encode_question
from evaluation.quantised import quantised_change
from evaluation.report import write_report
from evaluation.scores import judge
from evaluation.testsets import read_testset
from model_io.options import add_model_options, chosen_model, open_model
from model_io.pixels import PAD_COLOR, preprocess_image

GREY = Image.new("RGB", (8, 8), PAD_COLOR)  # almost 0 once normalised


def answer_file(args, questions, model, tokenizer, path):
    """{row: {"seen": …, "blind": …}} of all questions, from `path` as far as they are there, then from the model, written as they come."""
    done = {}
    if path.is_file():
        whole = [
            line for line in path.read_bytes().split(b"\n")[:-1]
        ]  # what follows the last newline was being written when the run ended
        done = {row["row"]: row for row in map(json.loads, whole)}
        write_text(
            path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done.values())
        )
    todo = [i for i in range(len(questions)) if i not in done]
    size, mode, right = (
        model.config.vision.image_size,
        model.config.image_mode,
        [judge(questions[i], row["seen"]) for i, row in done.items() if "seen" in row],
    )

    def headline():
        name = (
            "choice by likelihood"
            if right and "choice by likelihood" in right[-1]
            else "exact match"
        )
        values = [scores[name] for scores in right if name in scores]
        return f"{name} {sum(values) / len(values):.1%}" if values else ""

    with (
        open(path, "a", encoding="utf-8") as file,
        tqdm(total=len(questions), initial=len(done), desc="asking", unit="q", disable=None) as bar,
    ):
        for start in range(0, len(todo), args.batch_size):
            numbers, pixels = [], []
            for i in todo[start : start + args.batch_size]:
                try:
                    pixels += [
                        preprocess_image(picture, size, mode) for picture in questions[i].pictures
                    ]
                    numbers.append(i)
                except USER_ERRORS as error:
                    if not args.skip_bad:
                        raise ValueError(
                            f"{args.file}: question {questions[i].id}: {one_line(error)} (--skip-bad leaves such rows out)"
                        ) from None
                    pixels = pixels[: sum(len(questions[j].pictures) for j in numbers)]
                    done[i] = {"row": i, "id": questions[i].id, "left_out": one_line(error)}
                    file.write(json.dumps(done[i], ensure_ascii=False) + "\n")
            batch = [questions[i] for i in numbers]
            bar.update(len(todo[start : start + args.batch_size]))
            if not batch:
                continue
            pixels = torch.stack(pixels) if pixels else None  # (M, 3, H, W)
            grey = (
                None
                if pixels is None
                else preprocess_image(GREY, size, mode).expand(len(pixels), -1, -1, -1)
            )
            seen, blind = (
                ask(model, tokenizer, batch, p, args.max_new_tokens) for p in (pixels, grey)
            )
            for i, question, s, b in zip(numbers, batch, seen, blind):
                row = {
                    "row": i,
                    "id": question.id,
                    **question.kinds,
                    "image": [p.name for p in question.pictures],
                    "question": question.question,
                    "truth": question.truth,
                    **(
                        {"choices": question.choices, "letter": question.letter}
                        if question.choices
                        else {}
                    ),
                    "seen": s,
                    "blind": b,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                done[i] = row
                right.append(judge(question, s))
            file.flush()
            bar.set_postfix_str(headline())
    return done


def settings_of(args, questions):
    """What predictions depend on, kept beside them: a run that differs must not go on from them."""
    asked = [
        (q.id, q.conversation, q.truth, [str(p) for p in q.pictures], q.choices, q.letter)
        for q in questions
    ]
    paths = [p for p in (args.model, args.llm, args.vision, args.projector) if p and p != "fresh"]
    own = {"run.json", "report.json"}  # of an --out that is the model's folder
    files = [
        f
        for p in map(model_folder, paths)
        for f in (sorted(p.iterdir()) if p.is_dir() else [p])
        if f.suffix in (".safetensors", ".bin", ".json", ".model") and f.name not in own
    ]
    weights = hashlib.sha256(
        repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]).encode()
    ).hexdigest()[:16]
    return {
        "questions": hashlib.sha256(repr(asked).encode("utf-8", "backslashreplace")).hexdigest()[
            :16
        ],
        "images": os.path.realpath(args.images),
        "weights": weights,
        "dtype": args.dtype,
        "quantize": args.quantize,
        "max_new_tokens": args.max_new_tokens,
    }


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file",
        help="PMC-VQA .csv, SLAKE or VQA-RAD .json, dialogs, or your own image, question, answer",
    )
    parser.add_argument("--images", required=True, help="folder that picture names are relative to")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for predictions.jsonl, report.json, report.md",
    )
    parser.add_argument(
        "--n",
        type=int,
        default=None,
        metavar="N",
        help="only N questions, drawn by --seed (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="questions asked at a time (default %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default %(default)s)")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out rows that cannot be asked, and count them in the report, instead of stopping at the first",
    )
    parser.add_argument(
        "--encoding", default="utf-8", help="of a table that is not UTF-8, e.g. gb18030"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="throw away the answers that --out holds of another run",
    )
    add_model_options(parser)
    args = parser.parse_args()
    check_ranges(
        args, batch_size=(1, 10**6), max_new_tokens=(1, 10**6), n=(1, 10**9), seed=(0, 2**63 - 1)
    )
    return args


def evaluate():
    args = parse_args()
    kind, questions, left_out = read_testset(args.file, args.images, args.skip_bad, args.encoding)
    if args.n and args.n < len(questions):
        questions = [
            questions[i]
            for i in sorted(
                np.random.default_rng(args.seed).choice(len(questions), args.n, replace=False)
            )
        ]
    args.model = chosen_model(args.model, args.llm, args.vision)
    model, tokenizer, _ = open_model(
        args.model,
        llm=args.llm,
        vision=args.vision,
        projector=args.projector,
        device=args.device,
        dtype=args.dtype,
        quantize=args.quantize,
        is_compiled=args.compile,
    )
    limit, fitting = model.config.text.max_position_embeddings, []
    for question in questions:
        n = len(encode_question(question, tokenizer, model.config, options=bool(question.choices)))
        if n < limit:
            fitting.append(question)
        elif args.skip_bad:
            left_out["question beyond the model's positions"] += 1
        else:
            raise ValueError(
                f"{args.file}: row {question.id}: the question takes {n} tokens, the model's positions end at {limit} (--skip-bad leaves such rows out)"
            )
    questions = fitting
    settings, path = settings_of(args, questions), args.out / "predictions.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    run = args.out / "run.json"
    if args.restart:
        path.unlink(missing_ok=True)
    elif path.is_file() and (not run.is_file() or json.loads(run.read_text()) != settings):
        raise ValueError(
            f"{args.out} holds answers of another run (other questions, pictures, weights or options): give another --out, or --restart to throw them away"
        )
    write_json(run, settings)
    done = answer_file(args, questions, model, tokenizer, path)
    write_report(
        args,
        kind,
        questions,
        left_out,
        done,
        quantised_change(
            args, [questions[i] for i in sorted(done) if "seen" in done[i]], model, tokenizer
        )
        if args.quantize
        else None,
    )


def main():
    if sys.argv[1:2] in (["compare"], ["rank"]):
        from evaluation import compare

        compare.main()
    else:
        evaluate()


if __name__ == "__main__":
    run_cli(main)

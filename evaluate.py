"""How good a model is, on a whole test set and with intervals; several systems side by side;
doctors' rankings.

    python evaluate.py FILE --images DIR --model DIR --out OUT
        PMC-VQA, SLAKE, VQA-RAD, dialogs or your own; one Markdown and JSON report
    python evaluate.py FILE … --quantize int8
        the same in 8 bits, and what that changes
    python evaluate.py compare FILE --images DIR --system A=DIR --system B=https://host/v1#model
            --out OUT
        Figure 4: the same questions to several systems
    python evaluate.py rank OUT ranking.csv …
        what doctors ranked blind on compare's page: win rates with intervals

Every question is asked again with the picture withheld (an even grey in its place): what a model
scores then, it did not see. Beside both stands what the best constant answer scores. Answers are
greedy. OUT holds predictions.jsonl, which a run that is started again goes on from, report.json and
report.md. Intervals: 95 %, bootstrap over pictures, since questions about one picture are not
independent.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.files import USER_ERRORS, model_folder, one_line, run_cli, write_json
from common.options import InRange
from evaluation import compare, ranking
from evaluation.answers import Answered, Predictions
from evaluation.asking import ask_batch, encode_question
from evaluation.quantised import QuantisedChange, quantised_change
from evaluation.report import make_report, write_report
from evaluation.scores import BY_LIKELIHOOD, EXACT_MATCH, judge
from evaluation.testsets import Question, by_pictures, read_testset
from model_io.adapters import base_folder
from model_io.beginnings import Beginnings
from model_io.options import add_model_options, chosen_model, open_model
from model_io.pixels import PAD_COLOR, preprocess_image
from model_io.tokens import Tokenizer
from qilin_min import Qilin

# almost 0 once normalised
GREY = Image.new("RGB", (8, 8), PAD_COLOR)

# --- 1. which questions ---------------------------------------------------------------------------


def drawn(questions: list[Question], n: int | None, seed: int) -> list[Question]:
    """n questions, drawn by the seed, in the order of the file; all where n is None."""
    if n is None or n >= len(questions):
        return questions
    places = np.random.default_rng(seed).choice(len(questions), n, replace=False)
    return [questions[i] for i in sorted(places)]


def that_fit(
    file: str,
    questions: list[Question],
    model: Qilin,
    tokenizer: Tokenizer,
    left_out: Counter[str],
    skip_bad: bool,
) -> list[Question]:
    """Those that end within the model's positions; others are counted in left_out, or a
    ValueError."""
    limit = model.config.text.max_position_embeddings
    fitting = []
    for question in questions:
        has_options = bool(question.choices)
        n = len(encode_question(question, tokenizer, model.config, options=has_options))
        if n < limit:
            fitting.append(question)
        elif skip_bad:
            left_out["question beyond the model's positions"] += 1
        else:
            raise ValueError(
                f"{file}: row {question.id}: the question takes {n} tokens, "
                f"the model's positions end at {limit} (--skip-bad leaves such rows out)"
            )
    return fitting


# --- 2. answers -----------------------------------------------------------------------------------


def headline(judged: list[dict[str, float]]) -> str:
    """The score so far, for the progress bar."""
    name = EXACT_MATCH
    if judged and BY_LIKELIHOOD in judged[-1]:
        name = BY_LIKELIHOOD
    values = [scores[name] for scores in judged if name in scores]
    return f"{name} {sum(values) / len(values):.1%}" if values else ""


def read_batch(
    predictions: Predictions,
    questions: dict[int, Question],
    model: Qilin,
    *,
    file: str,
    skip_bad: bool,
) -> tuple[list[int], torch.Tensor | None]:
    """The numbers of the questions whose pictures can be read, and these, (M, 3, H, W), or None
    where there are none. What cannot be read is left out, or a ValueError."""
    size = model.config.vision.image_size
    mode = model.config.image_mode
    numbers = []
    pixels = []
    for i, question in questions.items():
        try:
            own = [preprocess_image(picture, size, mode) for picture in question.pictures]
        except USER_ERRORS as error:
            if not skip_bad:
                raise ValueError(
                    f"{file}: question {question.id}: {one_line(error)} "
                    "(--skip-bad leaves such rows out)"
                ) from None
            predictions.leave_out(i, question, one_line(error))
            continue
        numbers.append(i)
        pixels += own
    return numbers, torch.stack(pixels) if pixels else None


def answer_all(
    predictions: Predictions,
    questions: list[Question],
    model: Qilin,
    tokenizer: Tokenizer,
    *,
    file: str,
    batch_size: int,
    max_new_tokens: int,
    skip_bad: bool,
) -> None:
    """Asks what `predictions` do not hold yet, with the picture and with a grey in its place;
    answers are written as they come."""
    todo = [i for i in range(len(questions)) if i not in predictions]
    todo = list(by_pictures({i: questions[i] for i in todo}))
    # the grey is used in every batch, so that it stays
    beginnings = Beginnings(model)
    judged = [judge(questions[i], row.seen) for i, row in predictions.answered.items()]
    grey = preprocess_image(GREY, model.config.vision.image_size, model.config.image_mode)
    with tqdm(
        total=len(questions), initial=len(predictions), desc="asking", unit="q", disable=None
    ) as bar:
        for start in range(0, len(todo), batch_size):
            asked = {i: questions[i] for i in todo[start : start + batch_size]}
            numbers, pixels = read_batch(predictions, asked, model, file=file, skip_bad=skip_bad)
            bar.update(len(asked))
            if not numbers:
                continue
            batch = [questions[i] for i in numbers]
            greys = None
            if pixels is not None:
                greys = grey.expand(len(pixels), -1, -1, -1)
            seen = ask_batch(beginnings, tokenizer, batch, pixels, max_new_tokens)
            withheld = ask_batch(beginnings, tokenizer, batch, greys, max_new_tokens)
            for i, with_picture, without in zip(numbers, seen, withheld, strict=True):
                predictions.add(i, questions[i], Answered(with_picture, without))
                judged.append(judge(questions[i], with_picture))
            predictions.flush()
            bar.set_postfix_str(headline(judged))


# --- 3. what answers depend on --------------------------------------------------------------------


def short_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def digest_of_questions(questions: list[Question]) -> str:
    asked = []
    for question in questions:
        pictures = [str(picture) for picture in question.pictures]
        asked.append(
            (
                question.id,
                question.conversation,
                question.truth,
                pictures,
                question.choices,
                question.letter,
            )
        )
    return short_digest(repr(asked))


def digest_of_weights(
    model: str | None,
    llm: str | None,
    vision: str | None,
    projector: str | None,
    base: str | None,
) -> str:
    """Of the names, sizes and times of the files that a model and its parts are loaded from."""
    parts = [model, llm, vision, projector, base_folder(model, llm, base)]
    # of an --out that is the model's folder
    own = {"run.json", "report.json"}
    given = [part for part in parts if part and part != "fresh"]
    files = []
    for path in map(model_folder, given):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in inside:
            is_model = file.suffix in (".safetensors", ".bin", ".json", ".model")
            if is_model and file.name not in own:
                status = file.stat()
                files.append((file.name, status.st_size, status.st_mtime_ns))
    return short_digest(repr(files))


def open_predictions(out: Path, settings: dict[str, Any], restart: bool) -> Predictions:
    """Those that a folder holds. ValueError where they are of another run, unless told to restart:
    `settings` is all they depend on, kept beside them."""
    path = out / "predictions.jsonl"
    kept = out / "run.json"
    out.mkdir(parents=True, exist_ok=True)
    if restart:
        path.unlink(missing_ok=True)
    elif path.is_file():
        is_same = kept.is_file() and json.loads(kept.read_text()) == settings
        if not is_same:
            raise ValueError(
                f"{out} holds answers of another run (other questions, pictures, weights or "
                "options): give another --out, or --restart to throw them away"
            )
    write_json(kept, settings)
    return Predictions(path)


# --- 4. the command -------------------------------------------------------------------------------


def add_test_set_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "file",
        help="PMC-VQA .csv, SLAKE or VQA-RAD .json, dialogs, or your own image, question, answer",
    )
    add("--images", required=True, help="folder that picture names are relative to")
    add(
        "--out",
        type=Path,
        required=True,
        help="folder for predictions.jsonl, report.json, report.md",
    )
    add(
        "--n",
        action=InRange,
        type=int,
        low=1,
        high=10**9,
        default=None,
        metavar="N",
        help="only N questions, drawn by --seed (default: all)",
    )
    add(
        "--seed",
        action=InRange,
        type=int,
        low=0,
        high=2**63 - 1,
        default=0,
        help="(default %(default)s)",
    )
    add(
        "--batch-size",
        action=InRange,
        type=int,
        low=1,
        high=10**6,
        default=16,
        help="questions asked at a time (default %(default)s)",
    )
    add(
        "--max-new-tokens",
        action=InRange,
        type=int,
        low=1,
        high=10**6,
        default=64,
        help="(default %(default)s)",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="leave out rows that cannot be asked, and count them in the report, instead of "
        "stopping at the first",
    )
    add("--encoding", default="utf-8", help="of a table that is not UTF-8, e.g. gb18030")
    add(
        "--restart",
        action="store_true",
        help="throw away the answers that --out holds of another run",
    )
    add_model_options(parser)


def change_by_bits(
    bits: str | None,
    open_ours: Callable[..., tuple[Qilin, Tokenizer, str]],
    model: Qilin,
    tokenizer: Tokenizer,
    questions: list[Question],
    batch_size: int,
) -> QuantisedChange | None:
    """What `bits` did to the logits of a model that was opened with them; None without."""
    if bits is None:
        return None
    plain, _, _ = open_ours(quantize=None)
    return quantised_change(plain, model, tokenizer, questions, bits=bits, batch_size=batch_size)


def run(args: argparse.Namespace) -> int:
    """Asks a test set, and writes the report. -> 0."""
    kind, questions, left_out = read_testset(args.file, args.images, args.skip_bad, args.encoding)
    questions = drawn(questions, args.n, args.seed)
    folder = chosen_model(args.model, args.llm, args.vision)
    open_ours = partial(
        open_model,
        folder,
        llm=args.llm,
        vision=args.vision,
        projector=args.projector,
        base=args.base,
        device=args.device,
        dtype=args.dtype,
        is_eager=args.eager,
    )
    model, tokenizer, _ = open_ours(quantize=args.quantize, is_compiled=args.compile)
    questions = that_fit(args.file, questions, model, tokenizer, left_out, args.skip_bad)
    settings = {
        "questions": digest_of_questions(questions),
        "images": os.path.realpath(args.images),
        "weights": digest_of_weights(folder, args.llm, args.vision, args.projector, args.base),
        "dtype": args.dtype,
        "quantize": args.quantize,
        "max_new_tokens": args.max_new_tokens,
    }
    with open_predictions(args.out, settings, args.restart) as predictions:
        answer_all(
            predictions,
            questions,
            model,
            tokenizer,
            file=args.file,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            skip_bad=args.skip_bad,
        )
    if not predictions.answered:
        raise ValueError(f"{args.file}: no question was left")
    if predictions.left_out:
        left_out["picture does not decode"] += len(predictions.left_out)
    questions, rows = predictions.in_order(questions)
    change = change_by_bits(args.quantize, open_ours, model, tokenizer, questions, args.batch_size)
    report = make_report(
        questions,
        rows,
        file=args.file,
        kind=kind,
        model=folder or args.llm,
        quantize=args.quantize,
        max_new_tokens=args.max_new_tokens,
        left_out=left_out,
        quantised=change,
    )
    write_report(args.out, report)
    return 0


def main() -> None:
    """The first word is a sub-command, or else a test set: a file called compare is ./compare."""
    name = Path(sys.argv[0]).name
    with_command = argparse.ArgumentParser(prog=name, usage=argparse.SUPPRESS, add_help=False)
    commands = with_command.add_subparsers(title="sub-commands", prog=name)
    compare.add_command(commands)
    ranking.add_command(commands)
    if sys.argv[1:] and sys.argv[1] in commands.choices:
        args = with_command.parse_args()
        sys.exit(args.run(args))
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=with_command.format_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_test_set_options(parser)
    sys.exit(run(parser.parse_args()))


if __name__ == "__main__":
    run_cli(main)

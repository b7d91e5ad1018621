"""How often a model answers right: greedy answers to every question of a dialog file, compared with its answers word for word.

    python evaluate.py heldout.json --images DIR --model DIR --out OUT

The same questions are asked again with the picture withheld (an even grey in its place): what a model scores then, it did not see.
Beside both stands what the best constant answer of each kind would score. OUT holds predictions.jsonl, report.json and report.md.
"""

import argparse
import json
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from qilin_min import (PAD_COLOR, USER_ERRORS, Rows, Tokenizer, answer_ids, check_conversation, check_ranges, encode_prompt, load_qilin, one_line,
                       preprocess_image, row_pictures, run_cli, write_json, write_text)

GREY = Image.new("RGB", (8, 8), PAD_COLOR)  # almost 0 once normalised


def normalise(text):
    """What exact match compares: full-width forms unified, blanks and the closing stop dropped."""
    return "".join(unicodedata.normalize("NFKC", text).split()).rstrip(".。")


def read_questions(path, images):
    """[(id, kind, conversation up to the question, truth, picture paths)] of a dialog file; ValueError names file and row."""
    questions = []
    for i, row in enumerate(Rows(path)):
        try:
            if not isinstance(row, dict):
                raise ValueError("not an object with id, image and conversations")
            conversation = row.get("conversations")
            check_conversation(conversation)
            if conversation[-1]["from"] != "gpt":
                raise ValueError("the last turn is no answer")
            if not isinstance(row.get("kind", ""), str):
                raise ValueError("'kind' is not a text")
            json.dumps(row, ensure_ascii=False).encode()  # a text that has no UTF-8 stops here, not when the answers are written
            paths = row_pictures(row, images)
        except USER_ERRORS as error:
            raise ValueError(f"{path}: row {i}: {one_line(error)}") from None
        questions.append((row.get("id", i), row.get("kind", "all"), conversation[:-1], conversation[-1]["value"], paths))
    if not questions:
        raise ValueError(f"{path}: no questions in it")
    return questions


def encode_all(path, questions, tokenizer, config):
    """The prompt of every question; ValueError names the row whose prompt does not fit."""
    prompts = [encode_prompt(conversation, tokenizer, config.n_image_tokens) for _, _, conversation, _, _ in questions]
    for i, prompt in enumerate(prompts):
        if len(prompt) >= config.text.max_position_embeddings:
            raise ValueError(f"{path}: row {i}: the question takes {len(prompt)} tokens, the model's positions end at {config.text.max_position_embeddings}")
    return prompts


def answer_all(model, tokenizer, prompts, pictures, batch_size, max_new_tokens, withheld):
    """Greedy answers in the order of the prompts; withheld puts GREY in every picture's place."""
    size, answers = model.config.vision.image_size, []
    for start in tqdm(range(0, len(prompts), batch_size), desc="picture withheld" if withheld else "with the picture", unit="batch", disable=None):
        batch = slice(start, start + batch_size)
        pixels = [preprocess_image(GREY if withheld else path, size, model.config.image_mode) for paths in pictures[batch] for path in paths]
        ids = answer_ids(model, prompts[batch], torch.stack(pixels) if pixels else None, max_new_tokens=max_new_tokens)
        answers += [tokenizer.decode(i) for i in ids]
    return answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="dialogs; the last answer of each is the one asked for; `kind`, where a row has one, groups the report")
    parser.add_argument("--images", required=True, help="folder that picture names are relative to")
    parser.add_argument("--model", required=True, help="folder of a whole model")
    parser.add_argument("--out", type=Path, required=True, help="folder for predictions.jsonl, report.json, report.md")
    parser.add_argument("--batch-size", type=int, default=16, help="questions answered at a time (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default %(default)s)")
    args = parser.parse_args()
    check_ranges(args, batch_size=(1, 10**6), max_new_tokens=(1, 10**6))
    questions = read_questions(args.file, args.images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_qilin(args.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    tokenizer = Tokenizer(args.model)
    prompts, pictures = encode_all(args.file, questions, tokenizer, model.config), [paths for *_, paths in questions]
    args.out.mkdir(parents=True, exist_ok=True)
    seen, blind = (answer_all(model, tokenizer, prompts, pictures, args.batch_size, args.max_new_tokens, withheld) for withheld in (False, True))

    truths = [normalise(truth) for *_, truth, _ in questions]
    right, right_blind = ([normalise(a) == t for a, t in zip(answers, truths)] for answers in (seen, blind))
    groups = defaultdict(list)
    for i, (_, kind, *_) in enumerate(questions):
        groups[kind].append(i)

    def score(rows):
        return {"n": len(rows), "accuracy": sum(right[i] for i in rows) / len(rows), "blind": sum(right_blind[i] for i in rows) / len(rows),
                "constant": Counter(truths[i] for i in rows).most_common(1)[0][1] / len(rows)}

    kinds = {kind: score(rows) for kind, rows in sorted(groups.items())}
    total = dict(score(range(len(questions))), constant=sum(s["n"] * s["constant"] for s in kinds.values()) / len(questions))  # the best one of each kind
    report = {"file": str(args.file), "model": str(args.model), **total, "pictures": len({p for *_, paths in questions for p in paths}), "kinds": kinds}
    lines = [f"# {Path(args.file).name}: {total['n']} questions about {report['pictures']} pictures", "",
             "| kind | n | accuracy | picture withheld | best constant answer of its kind |", "|---|---|---|---|---|"]
    lines += [f"| {kind} | {s['n']} | {s['accuracy']:.1%} | {s['blind']:.1%} | {s['constant']:.1%} |" for kind, s in [*((kind.replace("|", "/"), s) for kind, s in kinds.items() if kind != "all"), ("all", total)]]
    write_text(args.out / "predictions.jsonl", "".join(
        json.dumps({"id": id, "kind": kind, "image": [p.name for p in paths], "question": conversation[-1]["value"], "answer": a, "blind_answer": b,
                    "truth": truth, "right": r}, ensure_ascii=False) + "\n" for (id, kind, conversation, truth, paths), a, b, r in zip(questions, seen, blind, right)))
    write_json(args.out / "report.json", report)
    write_text(args.out / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run_cli(main)

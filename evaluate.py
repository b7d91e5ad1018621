"""How often a model answers right: greedy answers to every question of a dialog file, compared with its answers word for word.

    python evaluate.py heldout.json --images DIR --model DIR --out OUT

The same questions are asked again with the picture withheld (an even grey in its place): what a model scores then, it did not see.
Beside both stands the best constant answer. OUT holds predictions.jsonl, report.json and report.md.
"""

import argparse
import json
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from qilin_min import (Tokenizer, answer_ids, check_conversation, count_images, encode_prompt, load_qilin, model_folder, one_line, preprocess_image, read_json,
                       run_cli, write_json)

GREY = Image.new("RGB", (8, 8), (122, 116, 104))  # CLIP's mean colour: the colour of padding, almost 0 once normalised


def normalise(text):
    """What exact match compares: full-width forms unified, blanks and the closing stop dropped."""
    return "".join(unicodedata.normalize("NFKC", text).split()).rstrip(".。")


def read_questions(path, images):
    """[(id, kind, conversation up to the question, truth, picture paths)] of a dialog file; ValueError names file and row."""
    rows, questions = read_json(path), []
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: not a list of rows")
    for i, row in enumerate(rows):
        try:
            if not isinstance(row, dict):
                raise ValueError("not an object with id, image and conversations")
            conversation = row.get("conversations")
            check_conversation(conversation)
            if conversation[-1]["from"] != "gpt":
                raise ValueError("the last turn is no answer")
            names = [row["image"]] if isinstance(row.get("image"), str) else row.get("image") or []
            if len(names) != count_images(conversation):
                raise ValueError(f"{count_images(conversation)} <image> in the text, but {len(names)} pictures under 'image'")
            paths = [Path(images) / name for name in names]
            for file in paths:
                if not file.resolve().is_relative_to(Path(images).resolve()):
                    raise ValueError(f"picture {str(file)!r} lies outside the image folder")
                if not file.is_file():
                    raise ValueError(f"no such picture: {file}")
        except ValueError as error:
            raise ValueError(f"{path}: row {i}: {one_line(error)}") from None
        questions.append((row.get("id", i), row.get("kind", "all"), conversation[:-1], conversation[-1]["value"], paths))
    return questions


def answer_all(model, tokenizer, questions, batch_size, max_new_tokens, withheld):
    """Greedy answers in the order of the questions; withheld puts GREY in every picture's place."""
    size, answers = model.config.vision.image_size, []
    for start in tqdm(range(0, len(questions), batch_size), desc="picture withheld" if withheld else "with the picture", unit="batch", disable=None):
        batch = questions[start : start + batch_size]
        prompts = [encode_prompt(conversation, tokenizer, model.config.n_image_tokens) for _, _, conversation, _, _ in batch]
        pixels = [preprocess_image(GREY if withheld else path, size) for *_, paths in batch for path in paths]
        ids = answer_ids(model, prompts, torch.stack(pixels) if pixels else None, max_new_tokens=max_new_tokens)
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
    if args.batch_size < 1 or args.max_new_tokens < 1:
        raise ValueError("--batch-size and --max-new-tokens must be at least 1")
    questions = read_questions(args.file, args.images)
    folder = model_folder(args.model)
    tokenizer = Tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_qilin(folder, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    seen, blind = (answer_all(model, tokenizer, questions, args.batch_size, args.max_new_tokens, withheld) for withheld in (False, True))

    truths = [normalise(truth) for *_, truth, _ in questions]
    right, right_blind = ([normalise(a) == t for a, t in zip(answers, truths)] for answers in (seen, blind))
    groups = defaultdict(list)
    for i, (_, kind, *_) in enumerate(questions):
        groups[kind].append(i)

    def score(rows):
        return {"n": len(rows), "accuracy": sum(right[i] for i in rows) / len(rows), "blind": sum(right_blind[i] for i in rows) / len(rows),
                "constant": Counter(truths[i] for i in rows).most_common(1)[0][1] / len(rows)}

    total = score(range(len(questions)))
    report = {"file": str(args.file), "model": str(args.model), **total, "pictures": len({p for *_, paths in questions for p in paths}),
              "kinds": {kind: score(rows) for kind, rows in sorted(groups.items())}}
    lines = [f"# {Path(args.file).name}: {total['n']} questions about {report['pictures']} pictures", "",
             "| kind | n | accuracy | picture withheld | best constant answer |", "|---|---|---|---|---|"]
    lines += [f"| {kind} | {s['n']} | {s['accuracy']:.1%} | {s['blind']:.1%} | {s['constant']:.1%} |" for kind, s in [*report["kinds"].items(), ("all", total)]]
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "predictions.jsonl.partial", "w", encoding="utf-8") as file:
        for (id, kind, conversation, truth, paths), a, b, r in zip(questions, seen, blind, right):
            file.write(json.dumps({"id": id, "kind": kind, "image": [p.name for p in paths], "question": conversation[-1]["value"], "answer": a,
                                   "blind_answer": b, "truth": truth, "right": r}, ensure_ascii=False) + "\n")
    (args.out / "predictions.jsonl.partial").rename(args.out / "predictions.jsonl")
    write_json(args.out / "report.json", report)
    (args.out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    run_cli(main)

"""Raw files whose texts are as long as those of the paper's Tables 1 and 2.

    python tests/tools/synthetic.py OUT --rows 1000000
        any number of rows, in the paper's proportions; some captions are shared
    python tests/tools/synthetic.py OUT --rows paper --tokenizer weights/Llama2-Chinese-13b-Chat
        the paper's numbers of rows, texts of exactly so many tokens of this tokenizer, nothing that
        build would join or drop: `build` and `stats` give back both tables

Chinese text of ordinary medical phrases. Pictures are named, not made.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.paper import CASE_REPORT, OA, PMC_VQA, TABLE_1, TABLE_2, lengths_like
from model_io.tokens import Tokenizer

PHRASES = (
    "患者因反复胸痛就诊，既往有高血压病史。"
    "胸部CT平扫显示右肺上叶磨玻璃结节影，边界清楚，未见胸腔积液。"
    "超声检查提示肝脏内多发低回声病灶，最大者约3厘米。"
    "磁共振T2加权像呈高信号，增强扫描后明显强化。"
    "术后病理证实为腺癌，切缘阴性。"
    "随访两年无复发。"
    "血压120/80毫米汞柱，体温正常。"
    "左侧股骨颈骨折，行内固定治疗。"
    "眼底检查可见视网膜出血及渗出。"
    "内镜下见胃窦部溃疡，活检排除恶性。"
    "心电图示窦性心律，ST段压低。"
    "免疫组化显示CD20阳性，Ki-67约40%。"
)
# rows of the paper: case reports are in both of its subsets
SHARES = {
    "case": TABLE_1.pairs[CASE_REPORT],
    "oa": TABLE_1.pairs[OA],
    "vqa": TABLE_2.pairs[PMC_VQA],
}
# of this text, measured with a real 32000-piece vocabulary
TOKENS_A_CHARACTER = 1.31
LONGEST = 8000  # characters
# rows that are written at a time
BLOCK = 10_000

CASE_COLUMNS = ("PMC_id", "context", "question", "answer", "inline", "img_ref")
VQA_COLUMNS = (
    "index",
    "Figure_path",
    "Caption",
    "Question",
    "Choice A",
    "Choice B",
    "Choice C",
    "Choice D",
    "Answer",
    "split",
)


class Texts:
    """Texts of any length, cut out of a pool of shuffled sentences."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        sentences = [sentence + "。" for sentence in PHRASES.split("。") if sentence]
        self.pool = "".join(self.rng.permutation(sentences * 400))

    def cut(self, n_tokens, end=""):
        """A text of about so many tokens that ends so."""
        length = max(3, int(n_tokens / TOKENS_A_CHARACTER)) - len(end)
        start = int(self.rng.integers(0, len(self.pool) - LONGEST))
        return self.pool[start : start + min(length, LONGEST)] + end


class ExactTexts:
    """Texts of exactly so many tokens of a tokenizer, each from the beginning of a sentence."""

    def __init__(self, seed, tokenizer):
        self.tokenizer = tokenizer
        self.rng = np.random.default_rng(seed)
        self.pool = Texts(seed).pool
        begins = [i + 1 for i, c in enumerate(self.pool[:-LONGEST]) if c == "。"]
        # the beginning of this sentence is half digits, which build does not take for a text
        begins = [i for i in begins if not self.pool.startswith("血压", i)]
        self.starts = begins[:60]
        # {(start, tokens, end): characters}, of those that were cut before
        self.known = {}

    def cut(self, n_tokens, end=""):
        """A text of exactly so many tokens that ends so. ValueError where there is none."""
        first = int(self.rng.integers(0, len(self.starts)))
        for k in range(len(self.starts)):
            start = self.starts[(first + k) % len(self.starts)]
            key = (start, n_tokens, end)
            if key not in self.known:
                self.known[key] = self.length_of(start, n_tokens, end)
            length = self.known[key]
            if length:
                return self.pool[start : start + length] + end
        raise ValueError(f"no text of {n_tokens} tokens in this tokenizer")

    def length_of(self, start, n_tokens, end):
        """Characters from `start` that make n_tokens with `end`, by halving; 0: there is no such
        place."""
        low = 1
        high = LONGEST
        while low <= high:
            middle = (low + high) // 2
            n = len(self.tokenizer.encode(self.pool[start : start + middle] + end))
            if n == n_tokens:
                return middle
            if n < n_tokens:
                low = middle + 1
            else:
                high = middle - 1
        return 0


class Kinds:
    """How long the texts of each kind are, in tokens: those of n rows like the paper's."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def of(self, table, source, kind, n):
        """Whole numbers, one a row."""
        return lengths_like(table.texts[source, kind], n, self.rng).tolist()


def blocks(n):
    """(start, how many) of each block of n rows."""
    return ((start, min(BLOCK, n - start)) for start in range(0, n, BLOCK))


def write_cases(path, n_rows, texts, kinds):
    """Four questions an article, with one to three pictures."""
    contexts = kinds.of(TABLE_1, CASE_REPORT, "C", n_rows)
    inlines = kinds.of(TABLE_1, CASE_REPORT, "I", n_rows)
    questions = kinds.of(TABLE_2, CASE_REPORT, "Q", n_rows)
    answers = kinds.of(TABLE_2, CASE_REPORT, "A", n_rows)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CASE_COLUMNS)
        for i in tqdm(range(n_rows), desc=path.name, unit=" rows", disable=None):
            article = i // 4
            row = {
                "PMC_id": f"PMC{5_000_000 + article}",
                "context": texts.cut(contexts[i]),
                # what ends a question stays: a prompt would put it there
                "question": texts.cut(questions[i], end="？"),
                "answer": texts.cut(answers[i]),
                "inline": texts.cut(inlines[i]),
                "img_ref": str([f"F{k}" for k in range(1 + article % 3)]),
            }
            writer.writerow([row[column] for column in CASE_COLUMNS])


def write_captions(path, n_rows, texts, kinds, pictures_an_article):
    """With several pictures an article, of ten rows the first two share a caption."""
    captions = kinds.of(TABLE_1, OA, "I", n_rows)
    are_shared = pictures_an_article > 1
    caption = ""
    with open(path, "w", encoding="utf-8") as file:
        for i in tqdm(range(n_rows), desc=path.name, unit=" rows", disable=None):
            article, figure = divmod(i, pictures_an_article)
            if not (are_shared and i % 10 == 1):
                caption = texts.cut(captions[i])
            row = {"image": f"PMC{7_000_000 + article}_Fig{figure}.jpg", "caption": caption}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_questions(path, n_rows, texts, kinds):
    """Two questions a picture, with four choices."""
    questions = kinds.of(TABLE_2, PMC_VQA, "Q", n_rows)
    answers = kinds.of(TABLE_2, PMC_VQA, "A", n_rows)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(VQA_COLUMNS)
        for i in tqdm(range(n_rows), desc=path.name, unit=" rows", disable=None):
            picture = f"PMC{8_000_000 + i // 2}_Fig1_{i % 7}.jpg"
            question = texts.cut(questions[i], end="？")
            choices = [f" {letter}: {texts.cut(answers[i])} " for letter in "ABCD"]
            writer.writerow([i, picture, "", question, *choices, "ABCD"[i % 4], "train"])


def write(out, rows, seed=0, tokenizer=None):
    """case.csv, oa.jsonl, vqa.csv in `out`, `rows` in all, in the paper's proportions; None: as
    many as the paper has. With a tokenizer texts are exactly as long as they should be, and no two
    rows belong together."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    counts = dict(SHARES)
    if rows is not None:
        counts = {name: round(rows * n / sum(SHARES.values())) for name, n in SHARES.items()}
        counts["vqa"] = rows - counts["case"] - counts["oa"]
    texts = Texts(seed) if tokenizer is None else ExactTexts(seed, tokenizer)
    pictures_an_article = 5 if tokenizer is None else 1
    kinds = Kinds(seed)
    write_cases(out / "case.csv", counts["case"], texts, kinds)
    write_captions(out / "oa.jsonl", counts["oa"], texts, kinds, pictures_an_article)
    write_questions(out / "vqa.csv", counts["vqa"], texts, kinds)
    return counts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("--rows", default="1000000", metavar="N", help="a number, or `paper`")
    parser.add_argument("--tokenizer", default=None, help="a LLaMA folder or tokenizer.model")
    args = parser.parse_args()
    rows = None if args.rows == "paper" else int(args.rows)
    tokenizer = Tokenizer(args.tokenizer) if args.tokenizer else None
    print(write(args.out, rows, tokenizer=tokenizer))


if __name__ == "__main__":
    main()

"""Raw files with the length distributions of the paper's Tables 1 and 2, any number of rows:
python tests/tools/synthetic.py OUT --rows 1000000

Chinese text of ordinary medical phrases; lengths are log-normal through the tables' medians and
quartiles. Pictures are named, not made.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

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
# text: (median, Q1, Q3) in tokens, Tables 1 and 2
PAPER = {
    "context": (435, 211, 757),
    "inline": (59, 41, 83),
    "caption": (125, 68, 210),
    "case question": (21, 16, 26),
    "case answer": (27, 20, 38),
    "vqa question": (18, 15, 22),
    "vqa answer": (10, 6, 16),
}
# rows of the paper
SHARES = {"case": 316_838, "oa": 263_176, "vqa": 152_603}
# of this text, measured with a real 32000-piece vocabulary
TOKENS_A_CHARACTER = 1.31
# standard deviations from the median to a quartile
TO_QUARTILE = 0.67449
# rows that are drawn and written at a time
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

    def draw(self, kind, n):
        """n texts of a kind, as long as the paper's are."""
        median, low, high = PAPER[kind]
        sigma = np.log(high / low) / (2 * TO_QUARTILE)
        tokens = np.exp(self.rng.normal(np.log(median), sigma, n))
        lengths = np.maximum(4, tokens / TOKENS_A_CHARACTER).astype(int)
        starts = self.rng.integers(0, len(self.pool) - 8000, n)
        texts = []
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            texts.append(self.pool[start : start + min(length, 8000)])
        return texts


def blocks(n):
    """(start, how many) of each block of n rows."""
    return ((start, min(BLOCK, n - start)) for start in range(0, n, BLOCK))


def write_cases(path, n_rows, texts):
    """Four questions an article, with one to three pictures."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CASE_COLUMNS)
        for start, n in blocks(n_rows):
            contexts = texts.draw("context", n)
            questions = texts.draw("case question", n)
            answers = texts.draw("case answer", n)
            inlines = texts.draw("inline", n)
            for i in range(n):
                article = (start + i) // 4
                pictures = str([f"F{k}" for k in range(1 + article % 3)])
                name = f"PMC{5_000_000 + article}"
                writer.writerow([name, contexts[i], questions[i], answers[i], inlines[i], pictures])


def write_captions(path, n_rows, texts):
    """Five pictures an article; of ten rows the first two share a caption."""
    with open(path, "w", encoding="utf-8") as file:
        for start, n in blocks(n_rows):
            captions = texts.draw("caption", n)
            for i in range(n):
                article, figure = divmod(start + i, 5)
                row = {
                    "image": f"PMC{7_000_000 + article}_Fig{figure}.jpg",
                    "caption": captions[i - i % 2 if i % 10 < 2 else i],
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_questions(path, n_rows, texts):
    """Two questions a picture, with four choices."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(VQA_COLUMNS)
        for start, n in blocks(n_rows):
            choices = []
            for letter in "ABCD":
                choices.append([f" {letter}: {text} " for text in texts.draw("vqa answer", n)])
            questions = texts.draw("vqa question", n)
            for i in range(n):
                number = start + i
                picture = f"PMC{8_000_000 + number // 2}_Fig1_{i % 7}.jpg"
                own = [column[i] for column in choices]
                writer.writerow([number, picture, "", questions[i], *own, "ABCD"[i % 4], "train"])


def write(out, rows, seed=0):
    """case.csv, oa.jsonl, vqa.csv in `out`, `rows` in all, in the paper's proportions."""
    out = Path(out)
    texts = Texts(seed)
    out.mkdir(parents=True, exist_ok=True)
    counts = {name: round(rows * n / sum(SHARES.values())) for name, n in SHARES.items()}
    counts["vqa"] = rows - counts["case"] - counts["oa"]
    write_cases(out / "case.csv", counts["case"], texts)
    write_captions(out / "oa.jsonl", counts["oa"], texts)
    write_questions(out / "vqa.csv", counts["vqa"], texts)
    return counts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    print(write(args.out, args.rows))


if __name__ == "__main__":
    main()

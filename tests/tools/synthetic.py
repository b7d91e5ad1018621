"""Raw files with the length distributions of the paper's Tables 1 and 2, any number of rows: python
tests/tools/synthetic.py OUT --rows 1000000

Chinese text of ordinary medical phrases; lengths are log-normal through the tables' medians and
quartiles. Pictures are named, not made.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

PHRASES = (
    "患者因反复胸痛就诊，既往有高血压病史。胸部CT平扫显示右肺上叶磨玻璃结节影，边界清楚，未见胸腔积液。超声检查提示肝脏内多发低回声病灶，最大者约3厘米。"
    "磁共振T2加权像呈高信号，增强扫描后明显强化。术后病理证实为腺癌，切缘阴性。随访两年无复发。血压120/80毫米汞柱，体温正常。左侧股骨颈骨折，行内固定治疗。"
    "眼底检查可见视网膜出血及渗出。内镜下见胃窦部溃疡，活检排除恶性。心电图示窦性心律，ST段压低。免疫组化显示CD20阳性，Ki-67约40%。"
)
PAPER = {  # text: (median, Q1, Q3) in tokens, Tables 1 and 2
    "context": (435, 211, 757),
    "inline": (59, 41, 83),
    "caption": (125, 68, 210),
    "case question": (21, 16, 26),
    "case answer": (27, 20, 38),
    "vqa question": (18, 15, 22),
    "vqa answer": (10, 6, 16),
}
SHARES = {"case": 316_838, "oa": 263_176, "vqa": 152_603}  # rows of the paper
TOKENS_A_CHARACTER = 1.31  # of this text, measured with a real 32000-piece vocabulary


class Texts:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.pool = "".join(
            self.rng.permutation(
                [sentence + "。" for sentence in PHRASES.split("。") if sentence] * 400
            )
        )

    def draw(self, kind, n):
        median, low, high = PAPER[kind]
        sigma = np.log(high / low) / (2 * 0.67449)
        lengths = np.maximum(
            4, np.exp(self.rng.normal(np.log(median), sigma, n)) / TOKENS_A_CHARACTER
        ).astype(int)
        starts = self.rng.integers(0, len(self.pool) - 8000, n)
        return [
            self.pool[s : s + min(length, 8000)]
            for s, length in zip(starts.tolist(), lengths.tolist())
        ]


def write(out, rows, seed=0):
    """case.csv, oa.jsonl, vqa.csv in `out`, `rows` in all, in the paper's proportions."""
    out, texts, block = Path(out), Texts(seed), 10_000
    out.mkdir(parents=True, exist_ok=True)
    counts = {name: round(rows * n / sum(SHARES.values())) for name, n in SHARES.items()}
    counts["vqa"] = rows - counts["case"] - counts["oa"]

    def blocks(n):
        return ((start, min(block, n - start)) for start in range(0, n, block))

    with open(out / "case.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["PMC_id", "context", "question", "answer", "inline", "img_ref"])
        for start, n in blocks(counts["case"]):
            writer.writerows(
                zip(
                    (f"PMC{5_000_000 + (start + i) // 4}" for i in range(n)),
                    texts.draw("context", n),
                    texts.draw("case question", n),
                    texts.draw("case answer", n),
                    texts.draw("inline", n),
                    (str([f"F{k}" for k in range(1 + (start + i) // 4 % 3)]) for i in range(n)),
                )
            )
    with open(out / "oa.jsonl", "w", encoding="utf-8") as file:
        for start, n in blocks(counts["oa"]):
            captions = texts.draw("caption", n)
            file.writelines(
                json.dumps(
                    {
                        "image": f"PMC{7_000_000 + (start + i) // 5}_Fig{(start + i) % 5}.jpg",
                        "caption": captions[i - i % 2 if i % 10 < 2 else i],
                    },
                    ensure_ascii=False,
                )
                + "\n"
                for i in range(n)
            )
    with open(out / "vqa.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
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
            ]
        )
        for start, n in blocks(counts["vqa"]):
            answers = [
                [f" {letter}: {text} " for text in texts.draw("vqa answer", n)] for letter in "ABCD"
            ]
            writer.writerows(
                (
                    start + i,
                    f"PMC{8_000_000 + (start + i) // 2}_Fig1_{i % 7}.jpg",
                    "",
                    question,
                    *(column[i] for column in answers),
                    "ABCD"[i % 4],
                    "train",
                )
                for i, question in enumerate(texts.draw("vqa question", n))
            )
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("--rows", type=int, default=1_000_000)
    print(write(**vars(parser.parse_args())))

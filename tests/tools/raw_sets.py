"""Small raw files in the exact upstream schemas, written by us, with the Chinese a good translator
would give for each text. Used by the data tests."""

import csv
import functools
import json
import random
from pathlib import Path

from conftest import in_process
from PIL import Image

import data_prep

# English, Chinese; {0} a number
OA = [
    (
        "Axial CT image shows a {0} mm nodule in the left lower lobe.",
        "轴位CT图像显示左肺下叶一{0}毫米结节。",
    ),
    (
        "Chest radiograph of a {0}-year-old man without pleural effusion.",
        "一名{0}岁男性的胸部X光片，未见胸腔积液。",
    ),
    ("Bilateral hydronephrosis on ultrasound after {0} days.", "{0}天后超声显示双侧肾积水。"),
]
CONTEXT = (
    "A {0}-year-old woman presented with right knee pain for 3 months. There was no fever.",
    "一名{0}岁女性因右膝疼痛3个月就诊。无发热。",
)
INLINE = (
    "MRI showed a tear of the medial meniscus of the right knee (Figure {0}).",
    "MRI显示右膝内侧半月板撕裂（图{0}）。",
)
CASE_QA = (
    ("What does the MRI of the knee show in patient {0}?", "患者{0}的膝关节MRI显示什么？"),
    ("A tear of the medial meniscus.", "内侧半月板撕裂。"),
)
VQA_Q = ("What organ is shown in image {0}?", "图像{0}显示的是什么器官？")
CHOICES = [("Kidney", "肾脏"), ("Liver", "肝脏"), ("Spleen", "脾脏"), ("Heart", "心脏")]
VQA_CAPTION = ("Ultrasound of the liver with a {0} cm cyst.", "肝脏超声显示一{0}厘米囊肿。")


@functools.cache
def translations():
    """{English: Chinese} of all our texts."""
    table = {}
    for english, chinese in [*OA, CONTEXT, INLINE, *CASE_QA, VQA_Q, *CHOICES, VQA_CAPTION]:
        numbers = range(400) if "{0}" in english else (0,)
        for n in numbers:
            table[english.format(n)] = chinese.format(n)
    return table


def chinese_of(text):
    """What the good translator says of one of our texts."""
    return translations()[text]


def picture(path, size=(60, 40), seed=0):
    """A picture of one colour but for a pixel; both depend on its name, unless seeded."""
    rng = random.Random(seed or str(path.name))
    image = Image.new("RGB", size, colour(rng))
    image.putpixel((0, 0), colour(rng))
    image.save(path)


def colour(rng):
    return tuple(rng.randrange(256) for _ in range(3))


def write_table(path, columns, rows, bom=False, end="\n"):
    with open(path, "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        writer = csv.writer(file, lineterminator=end)
        writer.writerow(columns)
        writer.writerows(rows)


CHOICE_COLUMNS = ("Choice A", "Choice B", "Choice C", "Choice D")


def make_raw(folder, n=6):
    """pmc_oa.jsonl, case.csv, train_2.csv, train.csv and images/ in `folder`: n articles each."""
    folder = Path(folder)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    make_captions(folder / "pmc_oa.jsonl", images, n)
    make_cases(folder / "case.csv", images, n)
    make_questions(folder, images, n)
    return folder


def make_captions(path, images, n):
    """1 to 3 pictures share a caption."""
    with open(path, "w") as file:
        for a in range(n):
            caption = OA[a % 3][0].format(a + 3)
            for part in range(1 + a % 3):
                name = f"PMC{1000 + a}_Fig1_{part}.jpg"
                picture(images / name, (60 + 10 * part, 40))
                row = {"image": name, "caption": caption, "alignment_type": "pair"}
                file.write(json.dumps(row) + "\n")


def make_cases(path, images, n):
    """Two questions an article, with 1 to 4 pictures."""
    rows = []
    for a in range(n):
        references = [f"FIG{k}" for k in range(1 + a % 4)]
        for reference in references:
            picture(images / f"PMC{2000 + a}_{reference}.jpg", (50, 50))
        for q in range(2):
            rows.append(
                [
                    f"PMC{2000 + a}",
                    CONTEXT[0].format(30 + a),
                    "Q: " + CASE_QA[0][0].format(2 * a + q),
                    "A: " + CASE_QA[1][0],
                    INLINE[0].format(q + 1),
                    str(references),
                ]
            )
    columns = ["PMC_id", "context", "question", "answer", "inline", "img_ref"]
    write_table(path, columns, rows)


def make_questions(folder, images, n):
    """train_2.csv, and the older train.csv with the answer written out: two questions a picture."""
    rows = []
    first = []
    choices = [f" {letter}: {text} " for letter, (text, _) in zip("ABCD", CHOICES, strict=True)]
    for a in range(2 * n):
        name = f"PMC{3000 + a // 2}_Fig1_{a // 2}.jpg"
        picture(images / name)
        caption = VQA_CAPTION[0].format(a + 1)
        question = VQA_Q[0].format(a)
        letter = "ABCD"[a % 4]
        answer = CHOICES[a % 4][0]
        rows.append([a, name, caption, question, *choices, letter, "train"])
        first.append([name, question, answer, *choices, letter])
    write_table(
        folder / "train_2.csv",
        ["index", "Figure_path", "Caption", "Question", *CHOICE_COLUMNS, "Answer", "split"],
        rows,
        bom=True,
        end="\r\n",
    )
    write_table(
        folder / "train.csv",
        ["Figure_path", "Question", "Answer", *CHOICE_COLUMNS, "Answer_label"],
        first,
    )


def prep(*options, code=None, env=None):
    """`python data_prep.py options`: its exit code, stdout and stderr."""
    return in_process(data_prep.main, *options, code=code, env=env)

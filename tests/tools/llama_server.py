"""llama-server (xllamacpp) on this machine, with two GGUF files: says where, ends with its input.

python tests/tools/llama_server.py TEXT.gguf MMPROJ.gguf THREADS
"""

import sys

import xllamacpp


def main(text, mmproj, n_threads):
    params = xllamacpp.CommonParams()
    params.model.path = text
    params.mmproj.path = mmproj
    params.n_ctx = 2048
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = int(n_threads)
    params.cpuparams_batch.n_threads = int(n_threads)
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])

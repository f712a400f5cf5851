"""llama.cpp's server, which the wheel xllamacpp brings as a library, as a program with llama-server's options.

    bench/peers/install.sh xllamacpp
    bench/peers/envs/xllamacpp/bin/python bench/peers/llama_server.py -m FILE.gguf --port 8080 [-np 8] [-c 8192] [-t 2]

Answers until it is terminated. What it computes with is printed by llama.cpp on standard error.
"""

import argparse
import signal

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", dest="model", required=True, metavar="FILE")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("-np", dest="parallel", type=int, default=1, metavar="CLIENTS")
    parser.add_argument("-c", dest="context", type=int, default=4096, metavar="TOKENS")
    parser.add_argument("-t", dest="threads", type=int, default=2)
    args = parser.parse_args()
    how = xllamacpp.CommonParams()
    how.model.path, how.port, how.n_parallel, how.n_ctx = args.model, args.port, args.parallel, args.context
    how.cpuparams.n_threads = how.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(how)
    print(server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()

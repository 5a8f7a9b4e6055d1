"""What a server gives 32 clients at once, beside one alone.

    python benchmarks/serve_streams.py --serve "--codec bf16" --name native

starts `moekit serve babel` with the options given, asks for 96 tokens by 8 clients one after
another and then by 32 together, each with its own prompt and seed, and writes tokens/s, the time to
the first token and between two to `benchmarks/results/serve_streams.json`, under `--name`. It
stops where a client got another text in the crowd than alone. The clients are one process on the
same processors; its seconds of processor time are in the result.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moekit.core.record import start_record

RESULT = Path(__file__).parent / "results" / "serve_streams.json"
STREAMS = 32
TOKENS = 96
ALONE = 8  # of them are asked one after another first
PROMPT = "In the year {} the river rose and the town"


async def ask(url: str, number: int) -> dict[str, Any]:
    """One streamed completion; its text, tokens, and when pieces of it came."""
    address = urlsplit(url)
    body = json.dumps(
        {
            "model": "babel",
            "prompt": PROMPT.format(1400 + number),
            "max_tokens": TOKENS,
            "seed": number,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(
        f"POST {address.path}/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
        "Content-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    times, lines = [], []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            times.append(time.perf_counter() - started)
            lines.append(line)
    writer.close()
    chunks = [json.loads(line[6:]) for line in lines]
    return {
        "text": "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]),
        "tokens": chunks[-1]["usage"]["completion_tokens"],
        "times": times[:-2],  # but for the chunks of the reason and of usage
    }


async def crowd(url: str) -> list[dict[str, Any]]:
    return await asyncio.gather(*[ask(url, number) for number in range(STREAMS)])


def summary(answers: list[dict[str, Any]], seconds: float) -> dict[str, float]:
    gaps = [b - a for x in answers for a, b in zip(x["times"], x["times"][1:], strict=False)]
    return {
        "tokens_per_second": sum(x["tokens"] for x in answers) / seconds,
        "first_token_ms_median": 1000 * statistics.median(x["times"][0] for x in answers),
        "between_tokens_ms_median": 1000 * statistics.median(gaps),
        "between_tokens_ms_99": 1000 * statistics.quantiles(gaps, n=100)[98],
    }


def measure(url: str) -> dict[str, Any]:
    asyncio.run(ask(url, 0))  # kernels are built and caches filled at the first
    start = time.perf_counter()
    alone = [asyncio.run(ask(url, number)) for number in range(ALONE)]
    middle = time.perf_counter()
    busy = time.process_time()
    together = asyncio.run(crowd(url))
    end, busy = time.perf_counter(), time.process_time() - busy
    wrong = [n for n in range(ALONE) if together[n]["text"] != alone[n]["text"]]
    if wrong:
        sys.exit(f"clients {wrong} got another text in the crowd than alone")
    one, many = summary(alone, middle - start), summary(together, end - middle)
    return {
        "one_stream": one,
        "streams": many,
        "ratio": many["tokens_per_second"] / one["tokens_per_second"],
        "client_processor_seconds": busy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", default="", help="options of moekit serve")
    parser.add_argument("--name", required=True, help="the result's name")
    args = parser.parse_args()
    record = start_record("benchmark serve_streams", vars(args), seed=0)
    command = [sys.executable, "-m", "moekit", "serve", "babel", "--port", "0", "--json"]
    command += ["--max-streams", str(STREAMS), "--max-context", "512", *shlex.split(args.serve)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = measure(json.loads(server.stdout.readline())["url"])
    finally:
        server.terminate()
        server.wait()
    before = json.loads(RESULT.read_text())["metrics"] if RESULT.exists() else {"rows": {}}
    rows = {**before["rows"], args.name: {"options": args.serve, **found}}
    record.finish({"load_average": os.getloadavg()[0], "rows": rows})
    RESULT.write_text(json.dumps(json.loads(record.to_json()), indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

"""A QMP server for benches: greets, negotiates, and says the same to whatever is asked.

python qmp_answering.py <socket>      prints "listening", then serves any number of clients
"""

import asyncio
import json
import sys

MIGRATING = {
    "expected-downtime": 300, "status": "active", "setup-time": 2, "total-time": 182,
    "ram": {
        "total": 268771328, "postcopy-requests": 0, "dirty-sync-count": 1, "multifd-bytes": 0,
        "pages-per-second": 73600, "downtime-bytes": 0, "page-size": 4096, "remaining": 225124352,
        "postcopy-bytes": 0, "mbps": 1081.81016, "transferred": 27049429, "normal": 6582,
        "dirty-sync-missed-zero-copy": 0, "precopy-bytes": 27049217, "duplicate": 4074,
        "dirty-pages-rate": 0, "normal-bytes": 26959872,
    },
}  # fmt: skip
GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}, "capabilities": []}}


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(json.dumps(GREETING).encode() + b"\r\n")
    decoder, text = json.JSONDecoder(), ""
    while chunk := await reader.read(65536):
        text += chunk.decode()
        while text := text.lstrip():
            try:
                message, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                break
            text = text[end:]
            answer = {} if message["execute"] == "qmp_capabilities" else MIGRATING
            echoed = {"id": message["id"]} if "id" in message else {}
            writer.write(json.dumps({"return": answer, **echoed}).encode() + b"\r\n")
    writer.close()


async def main(path: str) -> None:
    async with await asyncio.start_unix_server(serve, path) as server:
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))

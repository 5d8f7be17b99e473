"""Throughput of packing and unpacking, in millions of values a second, for every width."""

import torch

from compresskit import bits, measure

COUNT = 4_000_000


def main() -> None:
    """Print one line per width: median over rounds, and the quartiles' spread."""
    print(f"{'width':>5}{'pack, M/s':>12}{'spread':>9}{'unpack, M/s':>14}{'spread':>9}")
    for width in bits.WIDTHS:
        dtype = torch.uint8 if width <= 8 else torch.int32
        values = torch.randint(0, 1 << width, (COUNT,), dtype=dtype)
        data = bits.pack(values, width)
        times = measure.latency(
            {
                "pack": lambda values=values, width=width: bits.pack(values, width),
                "unpack": lambda data=data, width=width: bits.unpack(data, width, COUNT),
            },
            warmup=1,
            repeats=7,
        )
        row = "".join(
            f"{COUNT / t.median / 1e6:{size}.0f}{(t.high - t.low) / t.median:9.0%}"
            for t, size in ((times["pack"], 12), (times["unpack"], 14))
        )
        print(f"{width:5}{row}")


if __name__ == "__main__":
    main()

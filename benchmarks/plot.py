"""Draws what bench.py found: python plot.py <results.json> <target.png>."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

found = json.loads(Path(sys.argv[1]).read_text())
brokers = list(dict.fromkeys(row["broker"] for row in found["rows"]))
titles = {"sleep_per_s": "50 ms tasks/s", "empty_per_s": "empty tasks/s"}
figure, axes = plt.subplots(len(brokers), len(titles), figsize=(11, 3.6 * len(brokers)), squeeze=False)
for row, broker in enumerate(brokers):
    lines = [line for line in found["rows"] if line["broker"] == broker][::-1]
    for column, (key, title) in enumerate(titles.items()):
        axis = axes[row][column]
        colors = ["tab:red" if line["peer"] == "spakky" else "tab:gray" for line in lines]
        bars = axis.barh([line["peer"] for line in lines], [line[key] for line in lines], color=colors)
        axis.bar_label(bars, fmt="{:,.0f}", padding=3)
        axis.set_title(f"{broker}: {title}, one worker")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
figure.text(0.01, 0.005, f"{found['machine']}; {found['size']}", fontsize=8)
figure.tight_layout(rect=(0, 0.02, 1, 1))
figure.savefig(sys.argv[2], dpi=110)

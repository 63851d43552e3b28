"""The picture of the README: what the experts of the demo model do, and what their use says about it.

moe-audit run configs/demo.yaml --out runs/demo
python docs/demo_figure.py runs/demo docs/demo.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.colors import LogNorm
from scipy.stats import spearmanr


def main() -> None:
    run, target = Path(sys.argv[1]), Path(sys.argv[2])
    experts = pd.read_parquet(run / "results" / "experts.parquet")
    metrics = pd.read_parquet(run / "results" / "metrics.parquet")
    pooled = metrics[metrics["domain"].isna()].pivot(index=["layer", "expert"], columns="metric", values="value")
    table = experts.merge(pooled, left_on=["layer", "expert"], right_index=True)
    grid = table.pivot(index="layer", columns="expert", values="mean_kl")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", width_ratios=[1.25, 1])
    image = left.imshow(grid, norm=LogNorm(), cmap="magma_r", aspect="auto")
    figure.colorbar(image, ax=left, label="mean KL (nats)")
    left.set(title="Effect of removing each expert", xlabel="expert", ylabel="layer", yticks=range(len(grid)))
    colours = plt.get_cmap("viridis")
    for layer, mine in table.groupby("layer"):
        rank = spearmanr(mine["utilization"], mine["mean_kl"]).statistic
        label = f"layer {layer} (Spearman {rank:+.2f})"
        right.scatter(mine["utilization"], mine["mean_kl"], s=18, color=colours(layer / (len(grid) - 1)), label=label)
    right.set(title="Does use tell?", xlabel="utilization (share of tokens)", ylabel="mean KL (nats)", yscale="log")
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(target, dpi=140)
    columns = ["utilization", "activation_norm", "mean_routing_weight", "reap", "aimer"]
    ranks = {
        m: table.groupby("layer")[[m, "mean_kl"]].apply(lambda f, m=m: spearmanr(f[m], f["mean_kl"])[0])
        for m in columns
    }
    print(pd.DataFrame(ranks).round(2).to_string())


if __name__ == "__main__":
    main()

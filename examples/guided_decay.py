"""By how much guided decay shortens T_grok at p = 59: constant against guided weight decay, several seeds each.

python examples/guided_decay.py --seeds 4
"""

from __future__ import annotations

import argparse
import statistics

from normscope.grokking import GrokConfig, NormGuidedDecay, train

CRITICAL_NORM = 54.5  # of the free run at p = 59 and a training fraction of 0.4


def t_grok(seed: int, budget: int, decay: float = 1.0, guide: NormGuidedDecay | None = None) -> int | None:
    config = GrokConfig(p=59, seed=seed, max_steps=budget, weight_decay=decay, observe=())
    return train(config, interventions=[guide] if guide else []).transitions.t_grok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--budget", type=int, default=12_000)
    parser.add_argument("--gain", type=float, default=8.0)
    parser.add_argument("--most", type=float, default=10.0)
    parser.add_argument("--constant", type=float, default=1.0, help="the constant decay; the guided one has base 1")
    parser.add_argument("--rho", type=float, default=0.85, help="the target is rho * W_c")
    options = parser.parse_args()
    ratios = []
    for seed in range(options.seeds):
        guide = NormGuidedDecay(CRITICAL_NORM, rho=options.rho, gain=options.gain, most=options.most)
        constant = t_grok(seed, options.budget, options.constant)
        guided = t_grok(seed, options.budget, guide=guide)
        line = f"seed {seed}: T_grok {constant} with constant decay, {guided} with guided decay"
        if constant and guided:
            ratios.append(guided / constant)
            line += f", {ratios[-1]:.2f} times as long"
        print(line, flush=True)
    if ratios:
        print(f"median ratio {statistics.median(ratios):.3f} over {len(ratios)} seeds")


if __name__ == "__main__":
    main()

#!/bin/sh
# The delay law of grokking (Truong et al. 2026, arXiv 2606.13753) in four sweeps, each into a file of its own.
#
#   examples/delay_law.sh             all four
#   examples/delay_law.sh rho lr      some of them: critical_norm, moduli, lr, rho, attention
#
# A sweep that was stopped, or killed, goes on where it was: start the script again. Times are for two cores; NORMSCOPE
# names the command where `normscope` is not on the path, SEEDS the number of seeds (8).
set -eu
cd "$(dirname "$0")"
mkdir -p results
seeds=${SEEDS:-8}

sweep() {
    out=results/$1.csv
    shift
    ${NORMSCOPE:-normscope} sweep --seeds "$seeds" --out "$out" "$@"
}

# W_c at p = 59 over the share of training pairs. About 10 minutes.
critical_norm() {
    sweep critical_norm --p 59 --rho free --train-fraction 0.40,0.45,0.50,0.55,0.60,0.65
}

# One exponent for three moduli. About 25 minutes.
moduli() {
    sweep moduli --p 53,59,71 --rho 0.85,1.00,1.15 --budget 40000
}

# The learning rate, at 0.85 of its own critical norm and at one held norm for all. About 5 minutes.
lr() {
    sweep lr --p 59 --lr 0.001,0.002,0.004,0.008 --rho 0.85
    sweep lr_one_norm --p 59 --lr 0.001,0.002,0.004,0.008 --rho 0.85 --critical-norm 54.3
}

# The norm at one learning rate. About 40 minutes.
rho() {
    sweep rho --p 59 --rho 0.85,0.90,0.95,1.00,1.05,1.10,1.15,1.20,1.25,1.30 --budget 30000
}

# Attention without and with LayerNorm. About an hour; more where runs are censored.
attention() {
    sweep attention --p 59 --model attention,attention-layernorm --lr 0.0005 --rho 0.85,1.00 --budget 20000
}

for part in "${@:-critical_norm moduli lr rho attention}"; do
    for name in $part; do
        "$name"
    done
done

"""Every table and figure on one model, in one process: what the scripts share is computed once.

    python -u experiments/run_all.py --model PATH --text FILE --second OTHER_TEXT \\
        --calibrate OTHER_FILE --data DIR --measure-only [--only front,recall]
    python experiments/run_all.py --plot-only
"""
import sys

import allocation
import commuting
import cskv_bits
import cskv_kept
import cskv_split
import cskv_starts
import cskv_window
import front
import lorc_fig2
import lorc_fig4
import lorc_spectra
import lorc_table1_fig3
import lorc_tables2_3
import loss_metric
import metric
import recall
import study
import tasks

SCRIPTS = (lorc_spectra, lorc_fig4, lorc_tables2_3, lorc_fig2, lorc_table1_fig3, cskv_kept, front,
           metric, loss_metric, allocation, recall, tasks, cskv_starts, cskv_bits, cskv_split,
           cskv_window, commuting)


if __name__ == "__main__":
    sys.exit(study.main(*SCRIPTS))

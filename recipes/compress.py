"""The whole road: import, tokenize, score, search, prune, distill, evaluate, export, report. Skips what is done.

With rank.candidates > 0 the best candidates are trained a little after the search, and the winner is pruned.
"""

from compactlm_nemo.config.command import recipe
from compactlm_nemo.workflow.compress import compress

main = recipe(compress, __doc__)

if __name__ == "__main__":
    main()

"""lm-evaluation-harness's own command line, with all of its flags, and with the model `megalith`:

python -m megalith.evaluation run --model megalith --model_args path=runs/first --tasks hellaswag
"""

from __future__ import annotations

from megalith.common.extras import require

if __name__ == "__main__":
    main = require("lm_eval.__main__", "python -m megalith.evaluation").cli_evaluate
    require("megalith.evaluation.harness", "python -m megalith.evaluation", "lm_eval")  # which adds the model
    main()

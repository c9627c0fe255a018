"""The calculator of tiny: sums as it is taught them, from left to right, the last digit of each step.

echo '{"sum": "3+4*2"}' | python3 calc.py    ->    4

smol-post chat runs/tiny/merge --tools recipes/tiny/tools.json, then /no_think and: calc 3+4*2?
"""

import json
import operator
import re
import sys

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}

question = json.load(sys.stdin)["sum"]
if not re.fullmatch(r"\d([-+*]\d)*", question):
    sys.exit(f"found {question!r}, wanted digits and + - *, such as 3+4*2")
value = int(question[0])
for sign, digit in zip(question[1::2], question[2::2], strict=True):
    value = OPERATIONS[sign](value, int(digit)) % 10
print(value)

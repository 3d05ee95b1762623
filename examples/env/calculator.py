"""An environment for `temper grpo`: a calculator, and a check of the answer.

    temper grpo ... environment="python3 examples/env/calculator.py"

A turn that ends in `EXPRESSION=` (or has <calc>EXPRESSION</calc>) is a call: the environment answers with
the value. Any other turn is an answer: the last number in it is compared with the row's column `answer`.
A right answer is worth 1. After a wrong one the model may try once more, for half of that.

Standard library only. It reads a JSON line a request and writes one for each: docs/environments.md.
"""
import ast
import json
import operator
import re
import sys

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
CALL = re.compile(r"<calc>(.*?)</calc>|([-+*/().\d\s]+)=\s*$", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TRIES = 2


def value(node):
    """The value of an expression; nothing else than numbers, + - * / and brackets is evaluated."""
    if isinstance(node, ast.Expression):
        return value(node.body)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and abs(node.value) < 1e12:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    raise ValueError("not an expression of numbers, + - * / and brackets")


def calculate(text):
    try:
        if len(text) > 200:
            raise ValueError("too long")
        return f"{value(ast.parse(text.strip(), mode='eval')):.10g}"
    except (SyntaxError, ValueError, ArithmeticError) as error:
        return f"error: {error}"


def step(episode, text):
    """What the environment says to a turn: observation, reward, done."""
    call = CALL.search(text)
    if call:
        return {"observation": calculate(call.group(1) or call.group(2)), "reward": 0}
    episode["tries"] += 1
    said = NUMBER.findall(text)
    right = bool(said) and abs(float(said[-1]) - episode["answer"]) < 1e-6
    if right:
        return {"reward": 1 / episode["tries"], "done": True}
    if episode["tries"] == TRIES:
        return {"reward": 0, "done": True}
    return {"observation": "That is not right. Try again.", "reward": 0}


def main():
    episodes = {}
    for line in sys.stdin:
        request = json.loads(line)
        number, answer = request["episode"], {}
        if request["op"] == "reset":
            episodes[number] = {"answer": float(request["columns"]["answer"]), "tries": 0}
        else:
            answer = step(episodes[number], request["completion"])
        print(json.dumps({"id": request["id"], **answer}), flush=True)


main()

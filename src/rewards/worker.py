"""Runs one reward function of a user's file behind JSON lines: the other end of src/rewards/worker.rs.

A batch of rows comes as lines; the function is called once with all of them, as TRL calls it:
    def reward(prompts, completions, completion_ids, **columns) -> list of float or None
What the file prints goes to stderr, so that it cannot disturb the answers.
"""
import asyncio, importlib.util, inspect, json, os, sys, traceback

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
sys.stdout = sys.stderr


def load(path, name):
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location("temper_reward", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["temper_reward"] = module
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise AttributeError(f"{path} has no function {name}")
    return getattr(module, name)


def call(function, rows):
    given = {"prompts": [r["prompt"] for r in rows], "completions": [r["completion"] for r in rows],
             "completion_ids": [r["completion_ids"] for r in rows]}
    given.update({name: [r["columns"][name] for r in rows] for name in rows[0]["columns"]})
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        given = {p.name: given[p.name] for p in parameters if p.name in given}
    rewards = function(**given)
    if inspect.isawaitable(rewards):
        async def finish():
            return await rewards
        rewards = asyncio.run(finish())
    rewards = list(rewards)
    if len(rewards) != len(rows):
        raise ValueError(f"it returned {len(rewards)} rewards for {len(rows)} completions")
    numbers = [None if r is None else float(r) for r in rewards]
    return [None if r is None or r != r else r for r in numbers]


def main():
    path, name = sys.argv[1:3]
    function, failure, rows = None, None, []
    try:
        function = load(path, name)
    except BaseException:
        failure = traceback.format_exc()
    for line in sys.stdin:
        rows.append(json.loads(line))
        if len(rows) < rows[0]["batch"]:
            continue
        if failure is None:
            try:
                for row, reward in zip(rows, call(function, rows)):
                    answers.write(json.dumps({"id": row["id"], "reward": reward}) + "\n")
            except Exception:
                failure = traceback.format_exc()
        if failure is not None:
            answers.write(json.dumps({"id": rows[0]["id"], "error": failure}) + "\n")
        rows = []


main()

"""The Python tool when nobody attacks it: values, pictures, errors, limits, state, threads, and what outlives the trainer."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from mmrl.calling import Toolbox
from mmrl.errors import EnvironmentMissing, MMRLError
from mmrl.messages import Picture, ToolCall, ToolContext, ToolError
from mmrl.registry import ROOT
from tools import python_sandbox
from tools.python_sandbox import PythonSandbox, isolation_level, run_python
from tools.python_sandbox_parts import pool, shell
from tools.python_sandbox_parts.pool import JobLimits, SandboxError
from tools.python_sandbox_parts.shell import LEVELS, Level


@pytest.fixture(params=LEVELS[:-1])
def level(request: pytest.FixtureRequest, require: Callable[[str], None], installed: Callable[[str], None]) -> Level:
    """Each level that this machine reaches."""
    installed("matplotlib")
    if request.param == "bubblewrap":
        require("bubblewrap")
        pool.require(request.param, python_sandbox.PACKAGES)
    try:
        pool.require(request.param, python_sandbox.PACKAGES)
    except MMRLError as error:
        pytest.skip(str(error))
    return request.param


def sandbox(level: Level | None = None, **fields: object) -> PythonSandbox:
    return PythonSandbox(PythonSandbox.Config(isolation=level, warm=1, **fields))  # type: ignore[arg-type]


@pytest.fixture
def conversation(level: Level) -> Iterator[Callable[..., str]]:
    """The text of each call of one conversation whose state is kept."""
    tool, context = sandbox(level, keep_state=True, timeout_s=3.0), ToolContext()
    yield lambda code, **changes: tool(code, ToolContext(state=context.state, **changes)).text
    for value in context.state.values():
        value.close()


def picture(seed: int, width: int = 31, height: int = 17) -> Picture:
    return Picture(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)))


def pixels(picture: Picture | Image.Image) -> np.ndarray:
    return np.asarray(picture.image if isinstance(picture, Picture) else picture)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("6 * 7", "42"),
        ("print('a')\nprint('b', end='')\n'c'", "a\nb\n'c'"),
        ("x = 3", python_sandbox._NOTHING),
        ("None", python_sandbox._NOTHING),
        ("", python_sandbox._NOTHING),
        ("# nothing", python_sandbox._NOTHING),
        ("import sys\nprint('to stderr', file=sys.stderr)", "to stderr"),
        ("print('Grüße \\U0001f600 \\ud800')", "Grüße \U0001f600 \\ud800"),
        ("import numpy as np\nnp.arange(6).reshape(2, 3).sum(0)", "array([3, 5, 7])"),
        ("def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nf(15)", "610"),
        ("if __name__ == '__main__':\n    print('main')", "main"),
        ("len(images)", "0"),
        ("import sys\nsys.exit()", python_sandbox._NOTHING),
        ("import sys\nsys.stdout.buffer.write(b'raw'); None", "raw"),
    ],
)
def test_text_is_what_a_notebook_shows(code: str, text: str, level: Level) -> None:
    result = sandbox(level).run(code)
    assert (result.text, result.error, result.pictures) == (text, False, ())
    assert result.details == {"isolation": level}
    assert result.metrics["python_timeout"] == 0 and 0 < result.metrics["python_seconds"] < 20


def test_errors_show_the_code_s_own_lines() -> None:
    code = """import json
def inner(text):
    return json.loads(text)
try:
    inner('{')
except ValueError as e:
    raise KeyError('outer') from e"""
    result = sandbox().run("print('before')\n" + code)
    assert result.error
    assert result.text.startswith(
        "before\nTraceback (most recent call last):\n  File \"<call 1>\", line 6, in <module>\n    inner('{')"
    )
    assert "line 4, in inner" in result.text and result.text.endswith("KeyError: 'outer'")
    assert "json/decoder" not in result.text and "notebook.py" not in result.text
    wrong = sandbox().run("x = 1\nif x\n    pass")
    assert wrong.error and 'File "<call 1>", line 2' in wrong.text and "SyntaxError: expected ':'" in wrong.text


@pytest.mark.parametrize(
    "code",
    ["images[1]", "show(images[1])", "images[1].show()", "import numpy as np\nshow(np.asarray(images[1]))",
     "show(images[1].convert('RGBA'))", "import numpy as np\nshow(np.asarray(images[1]) / 255)"],
)  # fmt: skip
def test_pictures_go_in_and_come_out_unchanged(code: str, level: Level) -> None:
    shown = picture(1), picture(2, 1, 400)
    result = sandbox(level).run(code, shown)
    assert result.text == "" and len(result.pictures) == 1
    np.testing.assert_array_equal(pixels(result.pictures[0]), pixels(shown[1]))


def test_pictures_come_in_the_order_in_which_they_were_shown() -> None:
    first = picture(3)
    result = sandbox().run(
        "show(images[0].rotate(90, expand=True))\nprint(images[0].size)\nimages[0].crop((2, 3, 10, 9))", [first.image]
    )
    assert result.text == "(31, 17)"
    np.testing.assert_array_equal(pixels(result.pictures[0]), np.rot90(pixels(first)))
    np.testing.assert_array_equal(pixels(result.pictures[1]), pixels(first)[3:9, 2:10])


def test_figures_come_back_once(level: Level) -> None:
    code = """
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(figsize=(2, 1), dpi=50)
        axes.set_position([0, 0, 1, 1]); axes.set_axis_off()
        axes.imshow([[0, 1]], cmap="gray", aspect="auto")
        plt.show()
        figure
    """
    result = sandbox(level).run(textwrap.dedent(code))
    assert result.text == "" and [p.image.size for p in result.pictures] == [(100, 50)]
    image = pixels(result.pictures[0])
    assert (image[25, 25] == 0).all() and (image[25, 75] == 255).all()


def test_a_saved_picture_comes_back_if_nothing_else_does(level: Level) -> None:
    result = sandbox(level).run("images[0].save('out.png')", [picture(4)])
    if level == "landlock":
        assert result.error and "Permission denied: 'out.png'" in result.text
        return
    np.testing.assert_array_equal(pixels(result.pictures[0]), pixels(picture(4)))
    both = sandbox(level).run("images[0].save('out.png')\nshow(images[0].crop((0, 0, 2, 2)))", [picture(4)])
    assert [p.image.size for p in both.pictures] == [(2, 2)]


def test_what_show_cannot_take_is_an_error_of_the_code() -> None:
    assert "show() takes a PIL image, a matplotlib figure or an array, not str" in sandbox().run("show('x')").text


@pytest.mark.parametrize("mode, colour, seen", [("RGBA", (0, 0, 0, 0), 255), ("I;16", 0x8011, 0x80)])
def test_transparent_pixels_are_white_and_16_bits_become_8(mode: str, colour: object, seen: int) -> None:
    result = sandbox().run(f"from PIL import Image\nshow(Image.new('{mode}', (3, 2), {colour}))")
    assert (pixels(result.pictures[0]) == seen).all()


def test_pictures_are_limited_in_number_and_size() -> None:
    tool = sandbox(output_pictures=2, output_pixels=100)
    result = tool.run("from PIL import Image\nfor side in (10, 11, 9, 8): show(Image.new('L', (side, side)))")
    assert [p.image.size for p in result.pictures] == [(10, 10), (9, 9)]
    assert "A picture of 11 x 11 is left out: at most 100 pixels" in result.text and "Only the first 2 pictures" in result.text


def test_long_text_is_cut_and_the_error_survives() -> None:
    result = sandbox(output_characters=500).run("for i in range(10000): print(i)\n1 / 0")
    assert len(result.text) <= 500 and result.text.startswith("0\n1\n2\n")
    assert "characters left out" in result.text and result.text.endswith("ZeroDivisionError: division by zero")


def test_time_and_what_was_printed_before_it_was_up(level: Level) -> None:
    started = time.monotonic()
    result = sandbox(level, timeout_s=0.3).run("print('begun')\nwhile True: pass")
    assert result.error and result.metrics["python_timeout"] == 1 and time.monotonic() - started < 10
    assert result.text.startswith("begun\n") and result.text.endswith("TimeoutError: the code ran longer than 0.3 s")
    assert "line 2" in result.text


def test_the_time_of_the_context_counts_too() -> None:
    result = sandbox(timeout_s=60.0)("while True: pass", ToolContext(timeout_s=0.2))
    assert result.text.endswith("the code ran longer than 0.2 s")


def test_memory_is_limited_and_can_be_used_up_to_there(level: Level) -> None:
    tool = sandbox(level, memory_mb=128)
    assert tool.run("len(bytearray(90 << 20))").text == str(90 << 20)
    assert tool.run("bytearray(200 << 20)").text.endswith("MemoryError")


def test_nothing_is_kept_between_calls_unless_asked_for(level: Level) -> None:
    tool, context = sandbox(level), ToolContext()
    tool("x = 1; import builtins; builtins.leak = 1; import numpy; numpy.leak = 1", context)
    assert "NameError" in tool("x", context).text and "NameError" in tool("leak", context).text
    assert context.state == {}
    assert "AttributeError" in tool("import numpy; numpy.leak", context).text


def test_files_are_not_kept_either(level: Level) -> None:
    if level != "landlock":
        tool = sandbox(level)
        assert tool.run("open('f', 'w').write('mine')").text == "4"
        assert tool.run("import os; os.listdir('.') + os.listdir(os.environ['TMPDIR'])").text == "[]"


def test_state_lives_as_long_as_the_conversation(conversation: Callable[..., str]) -> None:
    assert conversation("import math\nx = [1]\ndef double(): return [2 * y for y in x]") == python_sandbox._NOTHING
    assert conversation("x.append(3); double()") == "[2, 6]"
    assert conversation("len(images)", pictures=[picture(1), picture(2)]) == "2"
    assert 'File "<call 1>", line 3, in double' in conversation("x = 0\ndouble()")
    assert 'File "<call 4>", line 2, in <module>\n    double()' in conversation("x = 0\ndouble()").replace("<call 5>", "<call 4>")
    assert conversation("math.floor(2.5) + x") == "2"


def test_state_survives_running_out_of_time_but_not_being_killed(conversation: Callable[..., str]) -> None:
    conversation("x = 5")
    assert conversation("while True: pass", timeout_s=0.2).endswith("longer than 0.2 s")
    assert conversation("x") == "5"
    killed = conversation("import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(9)", timeout_s=0.2)
    assert killed == "The code ran longer than 0.2 s and was killed. Variables of earlier calls are gone."
    assert "NameError" in conversation("x")


def test_an_answer_prepared_for_the_next_call_is_refused(conversation: Callable[..., str]) -> None:
    forge = """
        import gc, os
        from tools.python_sandbox_parts import wire
        request = next(thing for thing in gc.get_objects() if isinstance(thing, wire.Request) and thing.nonce)
        os.write(3, wire.pack_answer(wire.Answer(request.nonce, 0, "forged")) )
    """
    assert conversation(textwrap.dedent(forge)) == "forged"
    assert conversation("'honest'").startswith("An answer that does not fit the question")
    assert conversation("'honest'") == "'honest'"


def test_figures_of_code_that_failed_do_not_come_with_the_next_call(level: Level) -> None:
    tool, context = sandbox(level, keep_state=True), ToolContext()
    assert tool("import matplotlib.pyplot as plt\nplt.plot([1, 2])\n1 / 0", context).error
    assert tool("1", context).pictures == ()
    context.state["python_sandbox"].close()


def test_conversations_do_not_see_each_other(level: Level) -> None:
    tool, one, two = sandbox(level, keep_state=True), ToolContext(), ToolContext()
    tool("x = 1", one)
    tool("x = 2", two)
    assert (tool("x", one).text, tool("x", two).text) == ("1", "2")
    one.state["python_sandbox"].close()
    assert tool("x", two).text == "2"
    two.state["python_sandbox"].close()


def test_random_numbers_follow_from_the_generator() -> None:
    tool, code = sandbox(), "import random, numpy as np\nprint(random.random(), np.random.rand(), {'a', 'b', 'c', 'd'})"
    texts = [tool(code, ToolContext(generator=random.Random(seed))).text for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_many_threads_at_once(level: Level) -> None:
    tool = sandbox(level, parallel=3)
    code = "import time; time.sleep(0.05)\nshow(images[0]); print({})"
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda n: tool.run(code.format(n), [picture(n)]), range(24)))
    for number, result in enumerate(results):
        assert result.text == str(number)
        np.testing.assert_array_equal(pixels(result.pictures[0]), pixels(picture(number)))


def test_who_waits_too_long_for_a_turn_is_told() -> None:
    tool, context = sandbox(parallel=1), ToolContext(timeout_s=0.1)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(tool.run, "import time; time.sleep(1)")
        while tool._running._value:  # type: ignore[attr-defined]
            time.sleep(0.01)
        with pytest.raises(ToolError, match="busy"):
            tool("1", context)
        first.result()


def test_a_thread_that_ends_leaves_the_interpreters_to_the_others(level: Level) -> None:
    kept: list[pool.Zygote] = []
    starter = threading.Thread(target=lambda: kept.append(pool.Zygote(level, ())))
    starter.start()
    starter.join()
    time.sleep(0.1)
    kept[0].job(JobLimits(64, 1, 5)).close()
    kept[0].close()


def test_an_interpreter_waits_for_the_next_call(level: Level) -> None:
    zygote, limits = pool.Zygote(level, ()), JobLimits(64, 1, 5)
    zygote.job(limits, keep=2).close()
    assert [order.limits for order in zygote._orders] == [limits, limits]
    waiting = zygote._orders[0]
    job = zygote.job(limits, keep=2)
    assert waiting not in zygote._orders and job._stream is waiting.stream
    assert len(zygote._orders) == 2
    for number in range(40):
        zygote.job(JobLimits(64 + number, 1, 5), keep=1).close()
    assert len(zygote._orders) == pool._MOST_WAITING
    job.close()
    zygote.close()


def test_folders_of_trainers_that_were_killed_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.tempfile, "gettempdir", lambda: str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f"mmrl-python-{ended.pid}-old", f"mmrl-python-{ended.pid}-new", f"mmrl-python-{os.getpid()}-old", "mmrl-python-x"]
    for name in names:
        (tmp_path / name).mkdir()
        if not name.endswith("new"):
            os.utime(tmp_path / name, (0, 0))
    pool._sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_a_dead_zygote_is_replaced(level: Level) -> None:
    tool = sandbox(level)
    assert tool.run("1").text == "1"
    before = pool.zygote(level, python_sandbox.PACKAGES)
    assert before._process is not None
    jobs = descendants(before._process.pid)
    before._process.kill()
    before._keeper.join(5)
    assert wait_for_end(jobs) == set()
    assert tool.run("2").text == "2"
    assert pool.zygote(level, python_sandbox.PACKAGES) is not before


def test_a_fork_of_the_trainer_has_interpreters_of_its_own() -> None:
    tool = sandbox()
    assert tool.run("1").text == "1"
    pid = os.fork()
    if pid == 0:
        os._exit(0 if tool.run("2").text == "2" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert tool.run("3").text == "3"


def descendants(pid: int) -> set[int]:
    """Processes that ``pid`` started, and that they started."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def test_the_process_of_a_call_ends_with_it(level: Level) -> None:
    tool = sandbox(level)
    assert tool.run("1").text == "1"
    zygote = pool.zygote(level, python_sandbox.PACKAGES)
    assert zygote._process is not None
    code = "import threading, time\nthreading.Thread(target=lambda: [time.sleep(0.01) for _ in iter(int, 1)]).start()"
    before = wait_for_number(zygote._process.pid, len(zygote._orders))
    assert not tool.run(code).error
    assert wait_for_number(zygote._process.pid, len(zygote._orders)) == before


def wait_for_number(pid: int, waiting: int) -> int:
    """How many processes there are under ``pid`` once nothing changes any more; at least ``waiting``."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 0.3:
        number = len(descendants(pid))
        if number != last or number < waiting:
            last, since = number, time.monotonic()
        time.sleep(0.03)
    return last


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None], ids=["killed", "terminated", "ends"])
def test_no_process_outlives_the_trainer(how: signal.Signals | None, level: Level) -> None:
    program = f"""
        import sys, threading, time
        from mmrl.messages import ToolContext
        from tools.python_sandbox import PythonSandbox
        tool = PythonSandbox(PythonSandbox.Config(isolation={level!r}, keep_state=True, timeout_s=60.0, packages=()))
        tool("x = 1", ToolContext(state={{}}))
        spin = lambda: tool("import time\\nwhile True: time.sleep(0.01)", ToolContext(timeout_s=60.0))
        threading.Thread(target=spin, daemon=True).start()
        time.sleep(0.5)
        print("ready", flush=True)
        sys.stdin.readline()
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert trainer.stdin is not None and trainer.stdout is not None
    assert trainer.stdout.readline() == "ready\n"
    children = descendants(trainer.pid)
    assert len(children) >= 2
    if how is None:
        trainer.stdin.write("\n")
        trainer.stdin.flush()
    else:
        trainer.send_signal(how)
    trainer.wait(20)
    assert wait_for_end(children) == set()


def wait_for_end(pids: set[int]) -> set[int]:
    """Those that are left after ten seconds."""
    deadline = time.monotonic() + 10
    while (left := {pid for pid in pids if alive(pid)}) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_packages_that_were_not_asked_for_are_not_there(level: Level) -> None:
    tool = sandbox(level, packages=())
    assert tool.run("import PIL, numpy\nPIL.__name__").text == "'PIL'"
    for name in ("matplotlib", "torch", "pydantic", "mmrl"):
        assert f"No module named '{name}'" in tool.run(f"import {name}").text


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(EnvironmentMissing, match=r"no-such-thing.*pip install no-such-thing"):
        sandbox(packages=("no-such-thing",))


def test_run_python_takes_pictures_and_images() -> None:
    result = run_python(
        "[image.size for image in images]", images=[picture(0), picture(1, 5, 6).image], timeout_s=3.0, memory_mb=256
    )
    assert result.text == "[(31, 17), (5, 6)]"
    assert result.details["isolation"] == isolation_level()


def test_the_strongest_level_is_taken_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: set[Level] = {"namespaces", "landlock", "none"}

    def zygote(level: Level, packages: tuple[str, ...]) -> None:
        if level not in reached:
            raise SandboxError("it is not there")

    monkeypatch.setattr(pool, "zygote", zygote)
    assert isolation_level() == "namespaces" == sandbox().level
    reached.discard("namespaces")
    assert isolation_level() == "landlock" == sandbox().level
    with pytest.raises(MMRLError, match=r"isolation 'bubblewrap' is out of reach here \(it is not there\)"):
        sandbox("bubblewrap")
    reached.discard("landlock")
    assert isolation_level() is None
    with pytest.raises(EnvironmentMissing, match="apt-get install bubblewrap"):
        sandbox()
    assert sandbox(unsafe=True).level == "none"


def test_no_isolation_has_to_be_said_twice() -> None:
    with pytest.raises(ValidationError, match="set 'unsafe' to true if that is meant"):
        PythonSandbox.Config(isolation="none")


def test_without_bubblewrap_the_next_level_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert not shell.available("bubblewrap") and shell.available("landlock")


def test_calls_of_one_turn_see_what_the_ones_before_them_left(level: Level) -> None:
    toolbox, state = Toolbox([sandbox(level, keep_state=True)]), {}
    lines = ["numbers = [1]", *(f"numbers.append({n})" for n in range(2, 6)), "numbers"]
    calls = [ToolCall("python", {"code": line}) for line in lines]
    outcomes = toolbox.run(calls, pictures=[], state=state, seed=0, conversation=0, turn=0)
    assert outcomes[-1].result.text == "[1, 2, 3, 4, 5]"
    for value in state.values():
        value.close()
    toolbox.close()

"""The page as a person uses it: in a real Chromium, over a real `serve` process on the emulated cloud."""

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Route

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

PICTURE = Path(__file__).parents[2] / "examples" / "render.png"
SOON = 45_000
A_JOB = 150_000


class Visit:
    """One person at the page, and everything that a visit must never show."""

    def __init__(self, browser: "Browser", server: Any, **how: Any) -> None:
        how = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", "locale": "en-GB", **how}
        self.context = browser.new_context(**how)
        self.context.set_default_timeout(SOON)
        self.page: Page = self.context.new_page()
        self.server, self.wrong, self.foreign = server, list[str](), list[str]()
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", self._said)
        self.page.on("request", self._asked)

    def _said(self, said: Any) -> None:
        where = said.location.get("url", "")
        # A preview that is asked for when its job has just ended is gone; the result is shown in its place.
        if said.type == "error" and not re.search(r"/preview\?n=\d+$", where):
            self.wrong.append(f"{said.text} {where}")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.server.address + "/", "blob:", "data:")):
            self.foreign.append(request.url)

    def log_in(self) -> "Page":
        self.page.goto(self.server.login)
        self.page.get_by_text("Live", exact=True).wait_for(state="attached")
        return self.page

    def go(self, to: str, heading: str) -> None:
        self.page.evaluate("to => { location.hash = to }", to)
        self.page.get_by_role("heading", name=heading).first.wait_for()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the API as the page does."""
        return self.page.evaluate(
            """async ([method, path, body]) => {
                const answer = await fetch(path, {method, body: body && JSON.stringify(body),
                                                  headers: body ? {"Content-Type": "application/json"} : {}});
                return {status: answer.status, body: await answer.json()};
            }""",
            [method, path, body],
        )


def slow(seconds: float, prompt: str = "") -> dict[str, Any]:
    """A job that takes its time: a graph of the emulated server's."""
    steps = {"steps": 20, "seconds_per_step": seconds / 20, "preview": True, "seed": 7}
    graph = {
        "1": {"class_type": "ProbeSteps", "inputs": steps, "_meta": {"title": "<b>Slow</b> sampler"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "slow"}},
    }
    return {"workflow": graph, "metadata": {"note": prompt}}


def drop(page: "Page", place: "Locator", file: Path) -> None:
    """Drop a file as a person does who drags it out of a folder."""
    data = page.evaluate_handle(
        """([text, name]) => {
            const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, {type: "image/png"}));
            return transfer;
        }""",
        [base64.b64encode(file.read_bytes()).decode(), file.name],
    )
    place.dispatch_event("dragover", {"dataTransfer": data})
    place.dispatch_event("drop", {"dataTransfer": data})


def serious(page: "Page") -> list[str]:
    """What axe finds that keeps somebody out."""
    from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]

    found = Axe().run(page).response["violations"]
    bad = [one for one in found if one["impact"] in ("serious", "critical")]
    return [f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}" for one in bad]


def too_wide(page: "Page") -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def turned(canvas: "Locator", before: bytes) -> bytes:
    """Return what is shown once it is no longer `before` and moves no more; a software WebGL takes its time."""
    last = before
    for _ in range(100):
        now = canvas.screenshot()
        if now == last != before:
            break
        last = now
        canvas.page.wait_for_timeout(100)
    return last


def test_a_picture_becomes_a_mesh_and_the_rest_of_the_day(
    serve: Callable[..., Any], browser: "Browser", tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    visit = Visit(browser, serve())
    page = visit.log_in()
    assert "code=" not in page.url
    page.screenshot(path=tmp_path / "empty.png")

    # Drop a picture, say what to paint, send it.
    page.get_by_role("link", name="New job").click()
    page.get_by_label("Workflow").select_option("generate_flux_mesh")
    drop(page, page.locator(".drop"), PICTURE)
    expect(page.get_by_alt_text("The chosen picture")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("a helmet <img src=x onerror=alert(1)>")
    page.get_by_label("Seed").fill("18446744073709551557")
    send = page.get_by_role("button", name="Run it")
    expect(send).to_be_visible()
    send.dblclick()

    # Its own page; progress moves, and the result appears by itself.
    expect(page.get_by_role("heading", level=1)).to_contain_text("<img src=x")
    bar = page.get_by_role("progressbar", name=re.compile("Progress of job"))
    expect(bar).to_have_attribute("value", re.compile(r"[1-9]"), timeout=A_JOB)
    page.screenshot(path=tmp_path / "running.png")
    expect(page.locator(".title .badge")).to_have_text("done", timeout=A_JOB)
    assert len(visit.ask("GET", "/jobs")["body"]["jobs"]) == 1, "a double click is one job"
    expect(page.get_by_role("region", name="Nodes, as a table")).to_be_visible()
    expect(page.locator(".facts")).to_contain_text("18446744073709551557")  # exact, beyond what a double holds

    # Turn the mesh.
    canvas = page.locator("canvas[data-state=shown]")
    canvas.scroll_into_view_if_needed()
    before = canvas.screenshot()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 160, box["y"] + box["height"] / 2 + 20, steps=8)
    page.mouse.up()
    dragged = turned(canvas, before)
    assert dragged != before, "dragging turns the mesh"
    canvas.focus()
    page.keyboard.press("ArrowRight")
    assert turned(canvas, dragged) != dragged, "so do the arrow keys"
    page.screenshot(path=tmp_path / "job.png", full_page=True)

    # Cancel another: it appears in the list by itself, and is asked for first.
    visit.go("#/", "Finished")
    other = visit.ask("POST", "/jobs", slow(600))["body"]
    card = page.locator("li.job", has_text=f"#{other['number']} ")
    expect(card.get_by_role("progressbar")).to_be_visible(timeout=A_JOB)
    page.screenshot(path=tmp_path / "jobs.png")
    cancel = card.get_by_role("button", name=re.compile("Cancel"))
    cancel.click()
    question = page.get_by_role("dialog")
    expect(question).to_be_visible()
    page.keyboard.press("Escape")
    expect(question).to_have_count(0)
    expect(cancel).to_be_focused()
    assert visit.ask("GET", f"/jobs/{other['id']}")["body"]["status"] == "processing"
    cancel.click()
    question.get_by_role("button", name="Cancel the job").click()
    expect(card.locator(".badge")).to_have_text("cancelled")

    # Stop the machine, which is asked for too; then nothing bills.
    visit.go("#/machines", "Machines")
    page.get_by_role("button", name=re.compile("^Stop")).first.click()
    page.get_by_role("dialog").get_by_role("button", name="Stop the machine").click()
    expect(page.get_by_role("button", name=re.compile("^Stop"))).to_have_count(0, timeout=A_JOB)

    # Read the money.
    visit.go("#/money", "Money")
    expect(page.get_by_test_id("today")).to_have_text(re.compile(r"^(< \$0\.01|\$0\.(?!00)\d\d)$"))
    expect(page.locator("main")).to_contain_text("of $25.00")
    page.get_by_text("As a table").click()
    expect(page.get_by_role("region", name="Spent over time").get_by_role("row")).not_to_have_count(1)
    page.screenshot(path=tmp_path / "money.png", full_page=True)

    # By axe, and at every width, in light and dark.
    faults = []
    places = {"": "Finished", "new": "New job", "machines": "Machines", "money": "Money", "jobs/1": "a helmet"}
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 360)):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.set_viewport_size({"width": width, "height": 800})
        for place, heading in places.items():
            visit.go(f"#/{place}", heading)
            page.screenshot(path=tmp_path / f"{scheme}-{width}-{place.replace('/', '')}.png", full_page=True)
            faults += [f"{scheme} {width} #/{place}: {fault}" for fault in serious(page)]
            if too_wide(page):
                faults.append(f"{scheme} {width} #/{place}: it has to be scrolled sideways")
    assert faults == []
    assert visit.foreign == [], "nothing is loaded from elsewhere"
    assert visit.wrong == []


def test_orders_are_asked_for_shown_and_survive_a_lost_answer(
    serve: Callable[..., Any], browser: "Browser", tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    server = serve()
    visit = Visit(browser, server, viewport={"width": 390, "height": 800}, has_touch=True)
    page = visit.log_in()

    # Paused: jobs wait, and can be put in another order.
    page.get_by_role("button", name="Pause the queue").click()
    expect(page.get_by_role("button", name="Resume the queue")).to_be_visible()
    for _ in range(40):
        assert visit.ask("POST", "/jobs", slow(1))["status"] == 201
    waiting = page.get_by_role("region", name="Waiting").locator("li.job")
    expect(waiting).to_have_count(40)
    last = page.locator("li.job", has_text="#40 ")
    last.get_by_role("button", name=re.compile("Move to the front")).click()
    expect(waiting.first).to_contain_text("#40 ")
    page.reload()
    expect(waiting).to_have_count(30)  # a page
    expect(waiting.first).to_contain_text("#40 ")
    page.get_by_role("button", name="Show more").click()
    expect(waiting).to_have_count(40)

    # Faults are told at their fields, without asking the server.
    visit.go("#/new/wf_realistic_portrait", "New job")
    page.get_by_role("button", name="Run it").click()
    prompt = page.get_by_label("Prompt", exact=True)
    expect(prompt).to_be_focused()
    expect(prompt).to_have_accessible_description(re.compile("Write something"))
    prompt.fill("an old fisherman")
    page.get_by_text("More settings").click()
    page.get_by_label(re.compile("^Steps")).fill("1000")
    page.get_by_role("button", name="Run it").click()
    expect(page.get_by_text("At most 150.")).to_be_visible()
    page.get_by_label(re.compile("^Steps")).fill("12")

    # The answer to the order is lost; asked again under the same key, it is one job.
    lost: list[str] = []

    def lose(route: "Route") -> None:
        lost.append(route.request.headers["idempotency-key"])
        if len(lost) > 1:
            route.continue_()
            return
        route.fetch()  # the server has it
        route.abort()

    page.route(server.address + "/jobs", lose)
    page.get_by_role("button", name="Run it").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("an old fisherman")
    page.unroute(server.address + "/jobs")
    assert len(lost) == 2
    assert lost[0] == lost[1]
    assert visit.ask("GET", "/queue")["body"]["counts"]["pending"] == 41

    # Its priority, on its own page; and the switch between light and dark stays as it was set.
    page.get_by_label("Priority").fill("3")
    page.keyboard.press("Tab")
    expect(page.locator(".notices")).to_contain_text("priority 3")
    page.get_by_role("button", name="Switch to dark").click()
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert not too_wide(page)
    assert visit.foreign == []
    visit.wrong = [words for words in visit.wrong if "net::ERR_FAILED" not in words]
    assert visit.wrong == []


def test_who_is_not_logged_in_sees_how_to_get_in_and_no_data(
    serve: Callable[..., Any], browser: "Browser", tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    server = serve()
    stranger = Visit(browser, server)
    stranger.page.goto(server.address + "/#/money")
    expect(stranger.page.get_by_role("heading", name="You need a fresh address")).to_be_visible()
    assert "comfyctl serve" in stranger.page.inner_text("main")
    assert serious(stranger.page) == []
    stranger.page.screenshot(path=tmp_path / "stranger.png")

    # A server that goes away is seen to be gone; a new one does not know the session.
    visit = Visit(browser, server)
    page = visit.log_in()
    server.end()
    expect(page.get_by_text("Not connected")).to_be_visible()
    port = int(server.address.rpartition(":")[2])
    fresh = serve(port)
    expect(page.get_by_role("heading", name="You need a fresh address")).to_be_visible(timeout=A_JOB)
    page.unroute_all()
    page.goto(fresh.login)
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    assert visit.foreign == stranger.foreign == []


def test_a_connection_that_breaks_comes_back_with_what_was_missed(
    serve: Callable[..., Any], browser: "Browser"
) -> None:
    from playwright.sync_api import expect

    visit = Visit(browser, serve())
    page = visit.log_in()
    page.get_by_role("button", name="Pause the queue").click()
    expect(page.get_by_role("button", name="Resume the queue")).to_be_visible()

    # The way to the server breaks: the stream ends, and until it is mended no new one can be had.
    page.route("**/events*", lambda route: route.abort())
    page.reload()
    expect(page.get_by_text("Not connected")).to_be_visible()
    number = visit.ask("POST", "/jobs", slow(1))["body"]["number"]
    page.unroute("**/events*")
    expect(page.locator("li.job", has_text=f"#{number} ")).to_be_visible(timeout=A_JOB)
    expect(page.get_by_text("Live", exact=True)).to_be_visible()

    # It comes and goes, and everything is asked for anew each time. Who asks for more meanwhile gets more, whichever
    # answer is the last.
    for _ in range(34):
        assert visit.ask("POST", "/jobs", slow(1))["status"] == 201
    ends_at_once = {"content_type": "text/event-stream", "body": "retry: 200\n\n"}
    page.route("**/events*", lambda route: route.fulfill(**ends_at_once))
    held: list[Route] = []

    def overtake(route: "Route") -> None:
        if not held and "limit=60" in route.request.url:
            held.append(route)
            return
        route.continue_()
        if len(held) == 1:
            held.append(held[0])
            held[0].continue_()

    page.route("**/jobs?order=queue*", overtake)
    page.reload()
    waiting = page.get_by_role("region", name="Waiting").locator("li.job")
    expect(waiting).to_have_count(30)
    page.get_by_role("button", name="Show more").click()
    expect(waiting).to_have_count(35)
    page.unroute_all()


@pytest.mark.campaign
def test_a_job_is_seen_while_it_runs_and_after(serve: Callable[..., Any], browser: "Browser", tmp_path: Path) -> None:
    from playwright.sync_api import expect

    visit = Visit(browser, serve())
    page = visit.log_in()
    first = visit.ask("POST", "/jobs", slow(2))["body"]
    picture = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
    made = visit.ask("POST", "/jobs", {"workflow": "image_invert", "image": picture})["body"]

    # What went in beside what came out; over each other, by the keyboard; the log and the manifest.
    visit.go(f"#/jobs/{made['number']}", "Facts")
    expect(page.locator(".title .badge")).to_have_text("done", timeout=A_JOB)
    shown = page.locator("ul.media img")
    expect(shown).to_have_count(2)
    for n in range(2):
        shown.nth(n).scroll_into_view_if_needed()
        expect(shown.nth(n)).to_have_js_property("naturalWidth", 1024)
    page.get_by_text("Compare them").click()
    page.get_by_role("slider", name=re.compile("How much")).press("End")
    expect(page.locator("img.upper")).to_have_attribute("style", re.compile(r"inset\(0(px)? 0(%|px)?"))
    page.get_by_text("Log", exact=True).click()
    expect(page.get_by_role("region", name="Log")).to_contain_text("enqueued")
    manifest = visit.ask("GET", page.get_by_role("link", name="Manifest").get_attribute("href") or "")["body"]
    done = visit.ask("GET", f"/jobs/{made['id']}")["body"]
    assert [one["sha256"] for one in manifest["outputs"]] == [one["sha256"] for one in done["outputs"]]
    assert serious(page) == []

    # A film and a sound are played.
    film = {"filename_prefix": "film", "codec": "vp9", "fps": 12.0, "crf": 32.0}
    sound = {"duration": 1.5, "sample_rate": 44100, "channels": 2}
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 12, "color": 3368652}},
        "2": {"class_type": "SaveWEBM", "inputs": {"images": ["1", 0], **film}},
        "3": {"class_type": "EmptyAudio", "inputs": sound},
        "4": {"class_type": "SaveAudio", "inputs": {"audio": ["3", 0], "filename_prefix": "sound"}},
    }
    media = visit.ask("POST", "/jobs", {"workflow": graph})["body"]
    visit.go(f"#/jobs/{media['number']}", "Facts")
    expect(page.locator(".title .badge")).to_have_text("done", timeout=A_JOB)
    expect(page.locator("audio")).to_have_js_property("duration", 1.5)
    expect(page.locator("video")).to_have_js_property("videoWidth", 64)
    page.screenshot(path=tmp_path / "media.png", full_page=True)
    assert serious(page) == []

    # Run again with another seed: a job of its own.
    visit.go(f"#/jobs/{first['number']}", "Facts")
    page.get_by_role("button", name=re.compile("^Another seed")).click()
    expect(page.locator(".notices")).to_contain_text("with another seed")
    expect(page.locator(".title .meta")).not_to_contain_text(f"#{first['number']} ")
    number = re.findall(r"#(\d+)", page.locator(".title .meta").inner_text())[0]
    expect(page.locator(".title .badge")).to_have_text("done", timeout=A_JOB)
    seeds = [visit.ask("GET", f"/jobs/{one}")["body"]["seeds"] for one in (first["number"], number)]
    assert list(seeds[0]) == list(seeds[1]) == ["1.seed"]
    assert seeds[0] != seeds[1]

    # While it runs: what is painted now, the node, how long it still takes, what it has cost; all that by itself.
    second = visit.ask("POST", "/jobs", slow(90))["body"]
    visit.go("#/", "Finished")
    card = page.locator("li.job", has_text=f"#{second['number']} ")
    expect(card.locator(".doing")).to_contain_text("<b>Slow</b> sampler", timeout=A_JOB)
    painted = card.locator("img.thumb.now")
    expect(painted).to_have_js_property("complete", True)
    assert painted.evaluate("picture => picture.naturalWidth") > 0
    expect(card.locator(".meta")).to_contain_text("so far")
    machines = page.get_by_role("complementary", name="Machines and money")
    expect(machines).to_contain_text(re.compile(r"\$0\.99 an hour.*spent.*stops in \d+:\d\d", re.DOTALL))
    # What earlier jobs took is read twice a minute.
    expect(card.locator(".numbers")).to_contain_text(re.compile(r"(left|almost done)$"), timeout=A_JOB)
    page.screenshot(path=tmp_path / "seen.png")
    assert visit.ask("DELETE", f"/jobs/{second['id']}")["status"] == 200
    assert visit.foreign == []
    assert visit.wrong == []


@pytest.mark.campaign
def test_every_shipped_workflow_is_run_from_its_form(serve: Callable[..., Any], browser: "Browser") -> None:
    from playwright.sync_api import expect

    import workflows

    visit = Visit(browser, serve())
    page = visit.log_in()
    offered = {one["name"]: one for one in visit.ask("GET", "/workflows")["body"]["workflows"]}
    assert set(offered) == set(workflows.names())
    numbers = []
    for name, one in offered.items():
        visit.go(f"#/new/{name}", "New job")
        expect(page.get_by_label("Workflow")).to_have_value(name)
        for each in one["inputs"]:
            field = page.locator(f"[id='in-{each['name']}']")
            expect(field).to_have_count(1)
            if each["kind"] == "image":
                drop(page, page.locator(".drop", has=field), PICTURE)
                expect(page.get_by_alt_text("The chosen picture")).to_be_visible()
            elif each["kind"] == "text" and each["required"]:
                field.fill("a small house")
        assert serious(page) == [], name
        page.get_by_role("button", name="Run it").click()
        expect(page.locator(".title .meta")).to_contain_text(re.compile(r"#\d+"))
        numbers.append(re.findall(r"#(\d+)", page.locator(".title .meta").inner_text())[0])
    for number in numbers:
        visit.go(f"#/jobs/{number}", "Facts")
        expect(page.locator(".title .badge")).to_have_text("done", timeout=A_JOB)
    # What they cost is drawn, not only told.
    visit.go("#/money", "Money")
    expect(page.locator("figure.chart canvas").first).to_be_visible()
    assert page.locator("figure.chart canvas").count() >= 2, "spend, and busy against idle time"
    assert visit.foreign == []
    assert visit.wrong == []

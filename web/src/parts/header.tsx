import { ask, wordsOf } from "../api";
import { plural, total, usd } from "../format";
import { place, type Place } from "../route";
import { counts, link, loadQueue, money, queue, tell } from "../store";
import { dark, switchTheme } from "../theme";

const LINKS: { to: string; name: Place["name"]; text: string }[] = [
  { to: "#/", name: "jobs", text: "Jobs" },
  { to: "#/machines", name: "machines", text: "Machines" },
  { to: "#/money", name: "money", text: "Money" },
];

const CONNECTION = {
  live: ["Live", "What you see is what is."],
  connecting: ["Connecting", "Waiting for the server."],
  lost: ["Not connected", "What you see may be old; trying again."],
} as const;

async function pause(paused: boolean): Promise<void> {
  try {
    await ask("POST", paused ? "/queue/resume" : "/queue/pause", { json: {} });
    await loadQueue();
  } catch (error) {
    tell(wordsOf(error), true);
  }
}

export function Header() {
  const here = place.value.name === "job" ? "jobs" : place.value.name;
  const [word, more] = CONNECTION[link.value];
  return (
    <header class="top">
      <div class="bar">
        <a class="brand" href="#/" aria-label="comfyctl, to the jobs"><b>comfy</b>ctl</a>
        <span class={`link ${link.value}`} title={more}><i aria-hidden="true" /><span>{word}</span></span>
        <nav aria-label="Pages">
          {LINKS.map(({ to, name, text }) => (
            <a key={name} href={to} aria-current={here === name ? "page" : undefined}>{text}</a>
          ))}
        </nav>
        <div class="tools">
          <button type="button" class="plain" onClick={switchTheme} aria-label={dark.value ? "Switch to light" : "Switch to dark"}>
            <svg viewBox="0 0 20 20" width="18" height="18" aria-hidden="true">
              <circle cx="10" cy="10" r="7" fill="none" stroke="currentColor" stroke-width="1.6" />
              <path d="M10 3a7 7 0 0 1 0 14z" fill="currentColor" />
            </svg>
          </button>
          <a class="button primary" href="#/new">New job</a>
        </div>
      </div>
      <Glance />
    </header>
  );
}

function Glance() {
  const { processing, pending } = counts.value;
  const paused = queue.value?.paused ?? [];
  const why = paused[0];
  const idle = queue.value?.workers === 0 && pending > 0 && !why;
  const spent = money.value;
  const monthly = spent?.budgets.find((one) => one.name === "month" && one.scope === "all" && one.hard !== null);
  return (
    <section class="glance" aria-label="At a glance">
      <dl>
        <div><dt>Running</dt><dd>{processing.toLocaleString("en-US")}</dd></div>
        <div><dt>Waiting</dt><dd>{pending.toLocaleString("en-US")}</dd></div>
        <div><dt>Today</dt><dd data-testid="today">{total(spent?.today.usd)}</dd></div>
        <div>
          <dt>This month</dt>
          <dd>{total(spent?.month.usd)}{monthly?.hard ? <small> of {usd(monthly.hard)}</small> : null}</dd>
        </div>
      </dl>
      <div class="row">
        {why && <span class="paused">{why.message || "The queue is paused"}{paused.length > 1 ? ` and ${plural(paused.length - 1, "more pause")}` : ""}</span>}
        {idle && <span class="paused">Nothing works on the queue: what waits begins when comfyctl serve runs</span>}
        <button type="button" onClick={() => void pause(paused.length > 0)}>{paused.length ? "Resume the queue" : "Pause the queue"}</button>
      </div>
    </section>
  );
}

import { useMemo, useState } from "preact/hooks";

import { moment, plural, span, total, usd } from "../format";
import { Chart } from "../parts/chart";
import { Meter } from "../parts/pieces";
import { money } from "../store";
import type { Bucket, BudgetState, Money, Spent } from "../types";

const ALMOST = 0.8;
const PERIODS: Record<string, string> = { run: "This run", hour: "This hour", day: "Today", month: "This month" };

function Budget({ budget }: { budget: BudgetState }) {
  const spent = Number(budget.spent);
  const cap = budget.hard === null ? null : Number(budget.hard);
  const alert = budget.soft === null ? null : Number(budget.soft);
  const over = cap !== null && spent >= cap;
  const near = !over && ((alert !== null && spent >= alert) || (cap !== null && spent >= cap * ALMOST));
  const limit = cap ?? alert;
  const whose = budget.scope === "all" ? "" : budget.scope;
  const title = PERIODS[budget.name] ?? (budget.name || whose || "Budget");
  return (
    <li class="budget">
      <p>
        <span>{title}{whose && whose !== title && <small> {whose}</small>}</span>
        <span>{total(budget.spent)}{limit !== null && <small> of {usd(limit)}</small>}</span>
      </p>
      {limit !== null && <Meter value={spent} max={limit} label={`${title}: ${total(budget.spent)} of ${usd(limit)}`} tone={over ? "over" : near ? "near" : undefined} />}
      <p class="meta">
        {over && <span class="error">Used up: nothing more is rented{budget.ends_at ? ` until ${moment(budget.ends_at)}` : ""}.</span>}
        {near && <span class="warn">{cap === null ? "Past its alert" : "Almost used up"}.</span>}
        {!over && budget.left !== null && <span>{usd(budget.left)} left</span>}
        {budget.committed !== null && Number(budget.committed) > spent && <span>{total(budget.committed)} with what is promised</span>}
      </p>
    </li>
  );
}

function Sum({ title, spent }: { title: string; spent: Spent }) {
  const whole = spent.busy_s + spent.idle_s;
  return (
    <div class="sum">
      <dt>{title}</dt>
      <dd>
        <b>{total(spent.usd)}</b>
        <span class="meta">
          {spent.jobs !== undefined && <span>{plural(spent.jobs, "job")}</span>}
          {whole > 0 && <span>{Math.round((100 * spent.busy_s) / whole)} % busy</span>}
        </span>
      </dd>
    </div>
  );
}

export function MoneyGlance() {
  const all = money.value;
  return (
    <section aria-label="Money">
      <h2><a href="#/money">Money</a></h2>
      {all ? (
        <>
          <dl class="sums"><Sum title="Today" spent={all.today} /><Sum title="This month" spent={all.month} /></dl>
          {all.budgets.length > 0 ? (
            <ul class="stack budgets">{all.budgets.slice(0, 3).map((one) => <Budget key={one.name + one.scope} budget={one} />)}</ul>
          ) : (
            <p class="muted">No budget is set.</p>
          )}
        </>
      ) : (
        <p class="muted">Loading…</p>
      )}
    </section>
  );
}

export function MoneyPage() {
  const all = money.value;
  return (
    <div class="single">
      <h1>Money</h1>
      {all ? <Figures all={all} /> : <p class="muted" role="status">Loading…</p>}
    </div>
  );
}

function Figures({ all }: { all: Money }) {
  return (
    <>
      <dl class="sums big">
        <Sum title="Today" spent={all.today} />
        <Sum title="This month" spent={all.month} />
        {all.forecast_month_usd !== null && <div class="sum"><dt>By the end of the month</dt><dd><b>about {total(all.forecast_month_usd)}</b></dd></div>}
        {all.committed_usd !== null && <div class="sum"><dt>Promised by what runs now</dt><dd><b>{total(all.committed_usd)}</b></dd></div>}
      </dl>
      <section aria-labelledby="budgets">
        <h2 id="budgets">Budgets</h2>
        {all.budgets.length ? (
          <ul class="stack budgets">{all.budgets.map((one) => <Budget key={one.name + one.scope} budget={one} />)}</ul>
        ) : (
          <p class="muted">No budget is set. With one, nothing is rented past it.</p>
        )}
      </section>
      <Charts all={all} />
    </>
  );
}

function Charts({ all }: { all: Money }) {
  const [days, setDays] = useState(false);
  const buckets = days ? all.days : all.hours;
  const shown = useMemo(() => {
    const at = buckets.map((one) => Date.parse(one.at) / 1000);
    const unit = days ? 3600 : 60;
    return {
      at,
      spend: [{ label: "Spent", colour: "accent", values: buckets.map((one) => Number(one.usd)) }],
      time: [
        { label: "Busy", colour: "accent", values: buckets.map((one) => one.busy_s / unit) },
        { label: "Idle", colour: "idle", values: buckets.map((one) => one.idle_s / unit) },
      ],
    };
  }, [buckets, days]);
  return (
    <section aria-labelledby="over-time">
      <div class="row between">
        <h2 id="over-time">Over time</h2>
        <div class="filters" role="group" aria-label="By hour or by day">
          <button type="button" class="tab" aria-pressed={!days} onClick={() => setDays(false)}>Hours</button>
          <button type="button" class="tab" aria-pressed={days} onClick={() => setDays(true)}>Days</button>
        </div>
      </div>
      {buckets.length ? (
        <>
          <Chart label={`Spent per ${days ? "day" : "hour"}`} at={shown.at} stacks={shown.spend} format={usd} days={days} />
          <Chart label={`Machine ${days ? "hours per day" : "minutes per hour"}`} at={shown.at} stacks={shown.time} format={(value) => `${value} ${days ? "h" : "min"}`} days={days} />
          <Table buckets={buckets} days={days} />
        </>
      ) : (
        <p class="muted">Nothing has been spent yet.</p>
      )}
    </section>
  );
}

function Table({ buckets, days }: { buckets: Bucket[]; days: boolean }) {
  const used = [...buckets].reverse().filter((one) => Number(one.usd) > 0 || one.busy_s + one.idle_s > 0);
  const when = (at: string): string => new Date(at).toLocaleString(undefined, days ? { dateStyle: "medium" } : { dateStyle: "medium", timeStyle: "short" });
  return (
    <details>
      <summary>As a table</summary>
      <div class="scroll" tabIndex={0} role="region" aria-label="Spent over time">
        <table>
          <caption class="hidden">Spent, busy and idle time per {days ? "day" : "hour"}; those with nothing are left out</caption>
          <thead><tr><th scope="col">{days ? "Day" : "Hour"}</th><th scope="col">Spent</th><th scope="col">Busy</th><th scope="col">Idle</th></tr></thead>
          <tbody>
            {used.map((one) => (
              <tr key={one.at}><th scope="row">{when(one.at)}</th><td>{usd(one.usd)}</td><td>{span(one.busy_s)}</td><td>{span(one.idle_s)}</td></tr>
            ))}
          </tbody>
        </table>
      </div>
    </details>
  );
}

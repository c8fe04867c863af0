"""
When to rent machines and when to let them go: `plan(view)`, pure.

What is minimised is dollars + price of waiting x hours waited. A start is almost free (a boot is not billed, loading
models takes half a minute), so latency is bought with early starts and with idle time, not with the number of machines.
The rules, in the order in which they win:

 1. Limits stand outside: never more than `max_machines` (those that boot or drain counted), never without budget, never
    while `why_not` says so. `min_machines` are kept. Nothing busy is ever stopped, nothing before its paid step ends.
 2. Waiting jobs: scheduled over the machines there and on their way; further ones are launched as long as each spares
    more waiting than its start costs. The first is always worth it.
 3. Arrivals to come: `staffing` says how many machines the rate deserves; launched if that pays the start within 100 s,
    stopped if at 0.85 of the rate one fewer is cheaper and it was idle longer than its start was billed.
 4. The last idle machine is kept as long as one's own silences say (`keep_alive`). Where the user has set how long, all
    of them go when that is over for each: a rate that falls slowly keeps none.
 5. Signals: one warm machine while somebody is there, given up when the silence is long; shortly after they left, none.
 6. A known batch gets the machines that balance their starts against its waiting; after it, none is kept.

Among types the cheapest for the job's run time wins, one's own hardware first. A dearer type that starts faster (a
bridge) is rented if the wait it spares is worth more than its premium, and let go when a cheaper machine is there.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Final

from runcomfy.domain.demand import FAST_SHARE
from runcomfy.domain.keep_alive import keep_alive, worth_of_start
from runcomfy.domain.knobs import Knobs
from runcomfy.domain.list_schedule import Waiting
from runcomfy.domain.plan_view import Action, Launch, MachineView, OfferView, Plan, PlanView, Stage, Stop
from runcomfy.domain.staffing import Staffing, normal_quantile

_HOUR: Final = 3600.0
_LOOK_AGAIN_S: Final = 10.0
"""How soon a falling rate is looked at again."""
_HELD: Final = 2.0
"""A machine is held about twice as long as it computes (replays with learned keep-alive, by streams 1.6 to 4)."""
_JOBS_A_START: Final = 10
"""Jobs that share a load of models."""


class CostPlan:
    """The product's policy. Pure: the same view gives the same plan."""

    def __init__(self, knobs: Knobs | None = None) -> None:
        self._knobs = knobs or Knobs()

    @property
    def name(self) -> str:
        """Return what tables call it."""
        return "plan"

    def plan(self, view: PlanView) -> Plan:
        """Return what to launch and stop now, and when to look again."""
        if not view.offers:
            return Plan()
        return _Planning(view, self._knobs).plan()


@lru_cache(maxsize=64)
def _z(share: float) -> float:
    return normal_quantile(share)


class _Planning:
    """One plan in the making."""

    def __init__(self, view: PlanView, knobs: Knobs) -> None:
        self._view, self._knobs, self._now = view, knobs, view.now
        self._lam = view.wait_usd_per_hour
        self._offers = {offer.name: offer for offer in view.offers}
        self._waiting = sum(group.count for group in view.backlog)
        self._there = [machine for machine in view.machines if machine.stage is not Stage.DRAINING]
        self._coming = any(not machine.jobs and machine.idle_since is None for machine in self._there)
        self._ready = sum(1 for machine in self._there if machine.jobs or machine.idle_since is not None)
        self._cheapest_idle = min(
            (self._offer_of(machine).usd_per_hour for machine in self._there if machine.idle_since is not None),
            default=math.inf,
        )
        self._rented = sum(1 for machine in view.machines if not self._is_own(machine))
        self._rate = FAST_SHARE * view.demand.rate_fast + (1 - FAST_SHARE) * view.demand.rate_slow
        if view.presence.present:
            self._rate = max(self._rate, knobs.present_rate * view.demand.rate_session)
        self._looks: list[float] = []
        self._fewest: int | None = None
        # What no waiting job can use is not launched for those to come, either.
        names = {name for group in view.backlog for name in group.offers}
        choosy = bool(view.backlog) and all(group.offers for group in view.backlog)
        fitting = self._fitting(tuple(names) if choosy else ())
        self._main = self._choose(fitting)
        # What it would be if there were room: bridges are told by it.
        self._usual = self._main or self._choose([replace(offer, room=1) for offer in fitting or view.offers])
        self._bridges = [machine for machine in self._there if self._is_bridge(self._offer_of(machine))]

    def plan(self) -> Plan:
        actions: list[Action] = []
        if self._main is not None and not self._view.limits.why_not:
            actions = list(self._launches(self._main))
        if actions:
            # What could be stopped is asked again with the new ones in sight.
            self._look(self._now + 1)
        else:
            actions = list(self._stops())
        return Plan(tuple(actions), min(self._looks, default=None))

    # -- facts -----------------------------------------------------------------------------------------------

    def _look(self, at: float) -> None:
        self._looks += [at] if at > self._now else []

    def _is_own(self, machine: MachineView) -> bool:
        offer = self._offers.get(machine.offer)
        return offer is not None and offer.own

    def _offer_of(self, machine: MachineView) -> OfferView:
        return self._offers.get(machine.offer) or self._view.offers[0]

    def _is_bridge(self, offer: OfferView) -> bool:
        """Return whether a type costs more than the usual one and starts faster."""
        main = self._usual
        faster = main is not None and offer.boot_s + offer.load_s < main.boot_s + main.load_s
        return main is not None and faster and not offer.own and offer.usd_per_hour > main.usd_per_hour

    def _run_s(self, offer: OfferView) -> float:
        return self._view.demand.service_s * offer.speed

    def _fitting(self, names: tuple[str, ...]) -> list[OfferView]:
        return [offer for offer in self._view.offers if not names or offer.name in names]

    def _choose(self, offers: list[OfferView]) -> OfferView | None:
        """Return the type on which a job costs least, waiting included, of those that can be had."""
        to_have = [offer for offer in offers if offer.room > 0]

        def cost(offer: OfferView) -> tuple[bool, float, float]:
            run = self._run_s(offer)
            held = _HELD * run + offer.load_s / _JOBS_A_START
            return not offer.own, offer.usd_per_hour * held + self._lam * run, offer.boot_s

        return min(to_have, key=cost, default=None)

    def _free_in(self, machine: MachineView) -> float:
        if machine.stage is Stage.BOOTING:
            return max(machine.free_at, machine.ready_at + self._offer_of(machine).load_s) - self._now
        return max(0.0, machine.free_at - self._now)

    def _start_cost(self, offer: OfferView) -> float:
        """Return what starting one machine costs in USD, whatever it does then."""
        billed = offer.load_s + (offer.boot_s if offer.boot_billed else 0.0)
        if offer.step_s > self._knobs.long_step_s:
            billed = max(billed, offer.step_s / 2)
        return offer.usd_per_hour * max(billed, offer.minimum_s / 2) / _HOUR

    def _waits_per_cold(self, offer: OfferView) -> float:
        start = offer.boot_s + offer.load_s
        measured = self._view.demand.waits_per_cold
        return start if measured is None else min(max(start, measured), 4 * start)

    def _worth(self, offer: OfferView) -> float:
        """Return R of a machine of this type: what a cold start costs that keeping it spares, in seconds of it."""
        usable = [o for o in self._view.offers if o.room > 0 or o.name == offer.name] or [offer]
        usd = min(self._cold_start_usd(other) for other in usable)
        return usd / max(offer.usd_per_hour, 1e-9) * _HOUR

    def _cold_start_usd(self, offer: OfferView) -> float:
        """Return what a cold start costs in USD that is answered with this type."""
        seconds = worth_of_start(
            load_s=offer.load_s,
            billed_boot_s=offer.boot_s if offer.boot_billed else 0.0,
            usd_per_hour=max(offer.usd_per_hour, 1e-9),
            wait_usd_per_hour=self._lam,
            waits_s=self._waits_per_cold(offer),
        )
        usd = seconds * max(offer.usd_per_hour, 1e-9) / _HOUR
        main = self._usual
        if main is not None and self._is_bridge(offer):
            # A bridge: its premium until the cheaper machine takes over, and that one's load.
            premium = (offer.usd_per_hour - main.usd_per_hour) / _HOUR
            usd += premium * (main.boot_s + main.load_s) + 2 * self._start_cost(main)
        return usd

    def _staffing(self, share: float = 1.0) -> Staffing:
        demand, main = self._view.demand, self._usual or self._view.offers[0]
        return Staffing(
            rate=share * self._rate,
            seen=min(demand.seen, share * self._rate * self._knobs.window_s),
            service_s=demand.service_s * main.speed,
            service_cv2=demand.service_cv2,
            usd_per_hour=main.usd_per_hour,
            wait_usd_per_hour=self._lam,
            group=demand.group,
            # To wait for a second machine, two must be met: the square was best in replays, not the number of them.
            overlap=min(self._knobs.overlap_most, demand.overlap) ** 2,
        )

    # -- launching -------------------------------------------------------------------------------------------

    def _room(self, offer: OfferView, taken: int, spent_s: float) -> int:
        """Return how many of a type may still be launched, after `taken` and `spent_s` of the budget in this plan."""
        room = offer.room
        if not offer.own:
            room = min(room, self._view.limits.max_machines - self._rented - taken)
            if self._view.limits.budget_s is not None:
                room = min(room, int((self._view.limits.budget_s - spent_s) / max(self._least_s(offer), 1e-9)))
        return max(0, room)

    def _least_s(self, offer: OfferView) -> float:
        """Return what a machine uses up at least to do one job, in seconds of the cheapest type."""
        cheapest = min((o.usd_per_hour for o in self._view.offers if o.usd_per_hour > 0), default=1.0)
        billed = self._run_s(offer) + offer.load_s + (offer.boot_s if offer.boot_billed else 0.0)
        return max(billed, offer.minimum_s, offer.step_s) * offer.usd_per_hour / cheapest

    def _launches(self, main: OfferView) -> list[Launch]:
        free = [(self._free_in(machine), machine.offer) for machine in self._there]
        found: list[Launch] = []
        taken, spent_s, have, of_type = 0, 0.0, len(self._there), dict.fromkeys(self._offers, 0)
        for launch in self._for_waiting(free):
            offer = self._offers[launch.offer]
            count = min(launch.count, self._room(offer, taken, spent_s), offer.room - of_type[offer.name])
            if count > 0:
                of_type[offer.name] += count
                found.append(replace(launch, count=count, expected_usd=launch.expected_usd * count / launch.count))
                taken, spent_s = taken + (0 if offer.own else count), spent_s + count * self._least_s(offer)
                have += count
        wanted = self._ahead(main, have)
        if wanted is not None:
            left = main.room - of_type[main.name]
            count = min(wanted.count, self._room(main, taken, spent_s), left)
            if count > 0:
                found.append(replace(wanted, count=count, expected_usd=wanted.expected_usd * count / wanted.count))
        return found

    def _for_waiting(self, free: list[tuple[float, str]]) -> list[Launch]:
        """Return launches for what waits, kind by kind: kinds that run on the same types are one."""
        kinds: dict[tuple[str, ...], tuple[int, float]] = {}
        for group in self._view.backlog:
            count, work = kinds.get(group.offers, (0, 0.0))
            kinds[group.offers] = (count + group.count, work + group.count * group.service_s)
        found = []
        # The choosy ones first: what they leave, the others can use.
        for names, (count, work) in sorted(kinds.items(), key=lambda kind: (not kind[0], len(kind[0]), kind[0])):
            fits = [seconds for seconds, name in free if not names or name in names]
            waiting = Waiting(fits, count, work / count)
            launch = self._for_kind(waiting, names, count, work / count)
            if launch is not None:
                found.append(launch)
            if len(kinds) > 1:
                until = waiting.level()
                free = [(max(seconds, until), n) if not names or n in names else (seconds, n) for seconds, n in free]
                if launch is not None:
                    offer = self._offers[launch.offer]
                    busy = max(offer.boot_s + offer.load_s, waiting.level(launch.count, offer.boot_s + offer.load_s))
                    free += [(busy, offer.name)] * launch.count
        return found

    def _for_kind(self, waiting: Waiting, names: tuple[str, ...], count: int, service_s: float) -> Launch | None:
        main = self._choose(self._fitting(names))
        if main is None:
            return None
        lam_s = self._lam / _HOUR
        best: Launch | None = None
        least = math.inf
        before = waiting.total()
        for offer in self._fitting(names):
            room = self._room(offer, 0, 0.0)
            after = offer.boot_s + offer.load_s
            if room <= 0 or (offer is not main and after >= main.boot_s + main.load_s):
                continue
            premium = max(0.0, offer.usd_per_hour - main.usd_per_hour) * service_s * offer.speed / _HOUR
            start = self._start_cost(offer) + premium
            extra = waiting.best_extra(room, after, start / lam_s if lam_s > 0 else math.inf)
            left = waiting.total(extra, after)
            usd = extra * start + lam_s * left if left < math.inf else math.inf
            if usd < least:
                least, best = usd, None
                if extra:
                    spared = lam_s * (before - left)
                    net = extra * start - spared if before < math.inf else extra * start
                    best = Launch(offer.name, extra, self._why_waiting(count, before, left), net)
        return best

    def _why_waiting(self, count: int, before: float, left: float) -> str:
        jobs = "1 job waits" if count == 1 else f"{count} jobs wait"
        if before == math.inf:
            return f"{jobs}, and no machine that fits is there or on its way"
        return f"{jobs}: {before / count:.0f} s each with what is there, {left / count:.0f} s with this"

    def _ahead(self, main: OfferView, have: int) -> Launch | None:
        """Return the launch for what is to come: the largest number that anything asks for."""
        limits, start = self._view.limits, self._start_cost(main)
        asks: list[Launch] = [*self._for_batches(main, have), *self._for_people(main, have)]
        if have < limits.min_machines:
            why = f"min_machines is {limits.min_machines}"
            asks.append(Launch(main.name, limits.min_machines - have, why, start * (limits.min_machines - have)))
        if have and self._rate > 0 and not self._outlived():
            asks += self._for_rate(main, have)
        asks += self._instead_of_bridge(main)
        return max(asks, key=lambda launch: launch.count, default=None)

    def _for_rate(self, main: OfferView, have: int) -> list[Launch]:
        staffing = self._staffing()
        best = staffing.best(have, have + main.room)
        if best <= have:
            return []
        saved = staffing.cost(have) - staffing.cost(best)
        start = (best - have) * self._start_cost(main)
        if saved * self._knobs.pays_within_s / _HOUR <= start:
            return []
        why = (
            f"{self._rate * 60:.1f} jobs a minute of {staffing.service_s:.0f} s deserve {best} machines: "
            f"${staffing.cost(best):.2f} an hour instead of ${staffing.cost(have):.2f}, waiting included"
        )
        return [Launch(main.name, best - have, why, start - saved * self._knobs.pays_within_s / _HOUR)]

    def _instead_of_bridge(self, main: OfferView) -> list[Launch]:
        """Return the launch of the cheaper machine that takes over from a bridge.

        Taking over costs a load. As with skis, one changes when the premium paid so far is as much; at once if somebody
        is there, since they will go on.
        """
        if not self._there:
            return []
        dearest = [self._offer_of(machine) for machine in self._there]
        if len(self._bridges) < len(self._there):
            return []
        if not any(machine.idle_since is None or self._now < self._keep(machine)[0] for machine in self._there):
            return []  # all of it is on its way out
        premium = min(offer.usd_per_hour for offer in dearest) - main.usd_per_hour
        begun = min((m.billed_since for m in self._there if m.billed_since is not None), default=self._now)
        change = begun + self._start_cost(main) * _HOUR / premium
        if self._now < change and not self._view.presence.present:
            self._look(change)
            return []
        why = f"{main.name} is ${premium:.2f} an hour cheaper than what works now"
        return [Launch(main.name, 1, why, self._start_cost(main))]

    def _due(self, most: int) -> tuple[int, str]:
        """Return how many machines (at most so many) the known batches deserve whose time to launch has come."""
        main = self._usual or self._view.offers[0]
        number, why = 0, ""
        for batch in self._view.presence.batches:
            begin = batch.at - self._start_s(main)
            if batch.count <= 0 or self._now < begin:
                self._look(begin)
            elif self._now <= batch.at + self._knobs.hold_s:  # after that, it did not come
                self._look(batch.at + self._knobs.hold_s)
                work = batch.work_s if batch.work_s > 0 else batch.count * self._run_s(main)
                wanted = batch_machines(batch.count, work, main, self._lam, cap=most)
                if wanted > number:
                    seconds = max(0.0, batch.at - self._now)
                    number, why = wanted, f"{batch.count} jobs come in {seconds:.0f} s, {work:.0f} s of work"
        return number, why

    def _for_batches(self, main: OfferView, have: int) -> list[Launch]:
        number, why = self._due(have + self._room(main, 0, 0.0))
        if number <= have:
            return []
        return [Launch(main.name, number - have, why, (number - have) * self._start_cost(main))]

    def _for_people(self, main: OfferView, have: int) -> list[Launch]:
        presence = self._view.presence
        if have:
            return []
        start = self._start_cost(main)
        if presence.expected_until is not None and presence.expected_until > self._now:
            return [Launch(main.name, 1, "work was announced", start, self._knobs.hold_s)]
        if not presence.present:
            return []
        if self._now >= self._given_up_at(main):  # silent for so long that no machine is kept for them
            return []
        begin = self._now if presence.since is None else presence.since + presence.lead_s - self._start_s(main)
        if begin > self._now:
            self._look(begin)
            return []
        ahead = presence.lead_s if presence.since is None else min(presence.lead_s, self._start_s(main))
        idle = max(0.0, ahead - main.boot_s - main.load_s)
        usd = start + main.usd_per_hour * idle / _HOUR
        spared = self._worth(main) * main.usd_per_hour / _HOUR
        if spared <= usd:
            return []
        return [Launch(main.name, 1, "somebody is there and will want a machine", usd - spared)]

    def _given_up_at(self, offer: OfferView) -> float:
        """Return from when on no machine is kept for who is there, if no work comes."""
        since, silent = self._view.presence.since, self._view.demand.silent_since
        if since is None:
            return math.inf
        # Until then nobody was expected to send anything.
        expected = since + self._view.presence.lead_s - self._start_s(offer)
        return max(since, expected, silent if silent is not None else -math.inf) + self._present_keep(offer)

    def _start_s(self, offer: OfferView) -> float:
        """Return how long before work a start begins: being late costs waiting, being early costs idle time."""
        share = self._lam / (self._lam + offer.usd_per_hour) if self._lam > 0 else 0.5
        spread = max(0.0, offer.boot_p90_s - offer.boot_s) / _z(0.9)
        return offer.boot_s + offer.load_s + spread * max(0.0, _z(min(0.99, max(0.5, share))))

    # -- stopping --------------------------------------------------------------------------------------------

    def _stops(self) -> list[Stop]:
        have = len(self._there)
        found: list[Stop] = []
        if self._waiting:
            return found
        idle = [m for m in self._there if self._may_stop(m)]
        least = max(self._view.limits.min_machines, self._due(have)[0])
        outlived = self._outlived()
        for machine in sorted(idle, key=self._first_to_go):
            left = have - 1
            if self._is_own(machine) or left < least:
                continue
            if left and left < self._enough(have) and not outlived:
                self._look(self._now + _LOOK_AGAIN_S)
                break
            why = self._why_extra(machine, have) if left and not outlived else self._why_last(machine)
            if why:
                found.append(Stop(machine.id, why, -self._start_cost(self._offer_of(machine))))
                have -= 1
                self._ready -= machine.idle_since is not None
        return found

    def _outlived(self) -> bool:
        """Return whether nothing has work and all that is there was kept for as long as the user has set.

        A rate that falls slowly would keep several for minutes for which not even the last one is to be kept.
        """
        if self._view.keep_alive_s is None or any(machine.idle_since is None for machine in self._there):
            return False
        until = max((self._keep(machine)[0] for machine in self._there), default=self._now)
        self._look(until)
        return self._now >= until - 1e-6

    def _may_stop(self, machine: MachineView) -> bool:
        if (
            machine.jobs
            or machine.stage is Stage.DRAINING
            or (machine.idle_since is None and machine.stage is not Stage.BOOTING)
        ):
            return False
        if machine.hold_until > self._now:
            self._look(machine.hold_until)
            return False
        paid = self._paid_until(machine)
        if paid - self._now > self._knobs.step_margin_s:
            self._look(paid - self._knobs.step_margin_s)
            return False
        return True

    def _paid_until(self, machine: MachineView) -> float:
        """Return until when stopping spares nothing."""
        offer = self._offer_of(machine)
        if machine.billed_since is None or (offer.step_s <= self._knobs.long_step_s and not offer.minimum_s):
            return self._now
        used = max(0.0, self._now - machine.billed_since)
        step = offer.step_s if offer.step_s > self._knobs.long_step_s else 1.0
        return machine.billed_since + max(offer.minimum_s, math.ceil(used / step - 1e-9) * step)

    def _first_to_go(self, machine: MachineView) -> tuple[bool, float, float, str]:
        used = machine.last_used if machine.last_used is not None else -math.inf
        return machine.stage is not Stage.BOOTING, -self._offer_of(machine).usd_per_hour, used, machine.id

    def _why_extra(self, machine: MachineView, have: int) -> str:
        offer = self._offer_of(machine)
        if machine.stage is Stage.BOOTING:
            if machine.ready_at - self._now > self._knobs.cancel_s:
                self._look(machine.ready_at - self._knobs.cancel_s)
                return ""
            if not self._useless(machine):
                return ""
        else:
            if self._coming and self._ready - 1 < self._enough(have):
                # Another one is on its way: this one stays until that is there, or until nobody needs either.
                until, why = self._keep(machine)
                self._look(until)
                return why if self._now >= until - 1e-6 else ""
            since = machine.idle_since if machine.idle_since is not None else self._now
            ends = since + offer.load_s + (offer.boot_s if offer.boot_billed else 0.0)
            replaced = self._cheapest_idle < offer.usd_per_hour
            if self._now < ends - 1e-6 and not replaced:
                self._look(ends)
                return ""
        return f"{self._enough(have)} of {have} machines are enough for {self._rate * 60:.1f} jobs a minute"

    def _enough(self, have: int) -> int:
        """Return how many machines the rate deserves at least, somewhat pessimistically."""
        if self._fewest is None:
            self._fewest = self._staffing(self._knobs.stop_rate).fewest(have)
        return self._fewest

    def _useless(self, machine: MachineView) -> bool:
        """Return whether a machine that boots is not even needed to take over from a dearer one."""
        offer = self._offer_of(machine)
        return not any(
            self._offer_of(other).usd_per_hour > offer.usd_per_hour
            and (other.idle_since is None or self._now < self._keep(other)[0])
            for other in self._bridges
        )

    def _keep(self, machine: MachineView) -> tuple[float, str]:
        """Return until when the last machine is kept, and why."""
        view, knobs = self._view, self._knobs
        offer, presence = self._offer_of(machine), view.presence
        silent = view.demand.silent_since
        idle = machine.idle_since if machine.idle_since is not None else max(machine.launched_at, silent or 0.0)
        if view.keep_alive_s is not None:
            until = idle + view.keep_alive_s
            if presence.present and (kept := self._present_until(offer, idle)) > until:
                # Who is there would be given another machine at once.
                return kept, "somebody is there, but silent for long"
            return until, f"kept for the {view.keep_alive_s:.0f} s that are set"
        if view.demand.only_batches and not presence.present:
            return idle, "the batch is done"
        worth = self._worth(offer)
        last = view.demand.last_arrival
        if presence.present:
            return self._present_until(offer, idle), "somebody is there, but silent for long"
        if presence.left_at is not None and (last is None or last <= presence.left_at):
            # Who comes back says so before: then a start costs its load only.
            load = offer.load_s + (offer.boot_s if offer.boot_billed else 0.0)
            unannounced = load + max(0.0, worth - load) * (1 - presence.recall)
            learned = keep_alive(view.demand.silences, _rounded(unannounced))
            taught = len(view.demand.silences) >= knobs.linger_silences
            linger = min(knobs.linger_s, learned) if taught else knobs.linger_s
            kept = learned if presence.recall < 1 else 0.0
            return max(presence.left_at + linger, idle + kept), "everybody has left"
        learned = keep_alive(view.demand.silences, _rounded(worth))
        return idle + learned, f"silent for {learned:.0f} s; a cold start is worth {worth:.0f} s of it"

    def _present_until(self, offer: OfferView, idle: float) -> float:
        """Return until when a machine is kept for who is there: not ended while another one would be launched."""
        until = idle + self._present_keep(offer)
        given_up_at = self._given_up_at(self._main or offer)
        return max(until, given_up_at) if given_up_at < math.inf else until

    def _present_keep(self, offer: OfferView) -> float:
        return max(self._knobs.present_keep * self._worth(offer), 60.0)

    def _why_last(self, machine: MachineView) -> str:
        if machine.stage is Stage.BOOTING and machine.ready_at - self._now > self._knobs.cancel_s:
            self._look(machine.ready_at - self._knobs.cancel_s)
            return ""
        presence = self._view.presence
        if presence.expected_until is not None and presence.expected_until > self._now:
            self._look(presence.expected_until)
            return ""
        if machine.stage is Stage.BOOTING and presence.present:
            return ""
        until, why = self._keep(machine)
        if self._now < until - 1e-6:
            self._look(until)
            return ""
        return why


def batch_machines(count: int, work_s: float, offer: OfferView, wait_usd_per_hour: float, *, cap: int) -> int:
    """Return how many machines a known batch deserves: the minimum of c m W + lam N S / (2 m), from 1 to `cap`.

    `work_s` is the work S of all `count` jobs N together, in seconds; W is the load that each start is billed for.
    """
    billed = max(1.0, offer.load_s) * max(offer.usd_per_hour, 1e-9)
    number = math.sqrt(max(0.0, wait_usd_per_hour * count * work_s / (2 * billed)))
    return max(1, min(round(number), count, cap))


def _rounded(seconds: float) -> float:
    """Return three digits of it, so that a keep-alive is not computed anew at every plan."""
    return float(f"{seconds:.3g}")

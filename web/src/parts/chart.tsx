// Bars over time by uPlot. A picture for the eye; whoever shows one adds a table that says the same.

import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";

import { useEffect, useRef } from "preact/hooks";

import { dark } from "../theme";

export interface Stack {
  label: string;
  /** The name of a colour in style.css. */
  colour: string;
  values: number[];
}

interface Shown {
  /** Seconds since 1970, evenly apart. */
  at: number[];
  /** Drawn on top of each other, the first at the bottom. */
  stacks: Stack[];
  format: (value: number) => string;
  label: string;
  days: boolean;
}

const HEIGHT = 180;

export function Chart(shown: Shown) {
  const box = useRef<HTMLDivElement>(null);
  const isDark = dark.value;
  useEffect(() => {
    const element = box.current;
    if (!element) return undefined;
    const plot = new uPlot(options(shown, element), sums(shown), element);
    const watch = new ResizeObserver(() => plot.setSize({ width: element.clientWidth, height: HEIGHT }));
    watch.observe(element);
    return () => {
      watch.disconnect();
      plot.destroy();
    };
  }, [shown.at, shown.stacks, shown.days, isDark]);
  return (
    <figure class="chart">
      <figcaption>
        {shown.label}
        {shown.stacks.length > 1 && shown.stacks.map((one) => <span key={one.label} class={`key ${one.colour}`}>{one.label}</span>)}
      </figcaption>
      <div ref={box} role="img" aria-label={`${shown.label}; the same as a table below`} />
    </figure>
  );
}

/** Each series is the sum of all up to it; the largest is drawn first and the others over it. */
function sums({ at, stacks }: Shown): uPlot.AlignedData {
  const heights: number[][] = [];
  let under = at.map(() => 0);
  for (const { values } of stacks) {
    under = under.map((low, n) => low + (values[n] ?? 0));
    heights.unshift(under);
  }
  return [at, ...heights];
}

function options({ stacks, format, days }: Shown, element: HTMLElement): uPlot.Options {
  const style = getComputedStyle(document.documentElement);
  const colour = (name: string): string => style.getPropertyValue(`--${name}`).trim();
  const font = `12px ${getComputedStyle(element).fontFamily}`;
  const axis = { stroke: colour("muted"), font, ticks: { show: false }, grid: { stroke: colour("line"), width: 1 } };
  const paths = uPlot.paths.bars?.({ size: [0.72, 26], radius: 0.15 });
  return {
    width: element.clientWidth,
    height: HEIGHT,
    legend: { show: false },
    cursor: { show: false },
    scales: { x: { range: (_self, low, high) => pad(low, high, days) }, y: { range: (_self, _low, high) => [0, high > 0 ? high * 1.1 : 1] } },
    axes: [
      { ...axis, grid: { show: false }, space: 60, values: (_self, splits) => splits.map((at) => tick(at, days)), ...(days ? { incrs: [86_400, 172_800, 432_000, 604_800] } : {}) },
      { ...axis, size: 56, space: 36, values: (_self, splits) => splits.map(format) },
    ],
    series: [{}, ...[...stacks].reverse().map((one) => ({ label: one.label, fill: colour(one.colour), width: 0, points: { show: false }, ...(paths ? { paths } : {}) }))],
  };
}

const pad = (low: number, high: number, days: boolean): [number, number] => {
  const half = days ? 43_200 : 1_800;
  return [low - half, high + half];
};

const tick = (at: number, days: boolean): string =>
  new Date(at * 1000).toLocaleString(undefined, days ? { day: "numeric", month: "short" } : { hour: "2-digit", minute: "2-digit" });

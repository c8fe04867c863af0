// Light or dark: as the system has it, until the switch says otherwise.

import { computed, signal } from "@preact/signals";

type Choice = "system" | "light" | "dark";

const KEY = "comfyctl-theme";
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
const system = signal(prefersDark.matches);

function stored(): Choice {
  try {
    const found = localStorage.getItem(KEY);
    return found === "light" || found === "dark" ? found : "system";
  } catch {
    return "system";
  }
}

const choice = signal<Choice>(stored());
export const dark = computed(() => (choice.value === "system" ? system.value : choice.value === "dark"));

prefersDark.addEventListener("change", () => {
  system.value = prefersDark.matches;
});

dark.subscribe((is) => {
  document.documentElement.dataset["theme"] = is ? "dark" : "light";
});

/** The other one; the system's own is remembered as no choice, so that it is followed again. */
export function switchTheme(): void {
  const next: Choice = dark.value ? "light" : "dark";
  choice.value = (next === "dark") === system.value ? "system" : next;
  try {
    if (choice.value === "system") localStorage.removeItem(KEY);
    else localStorage.setItem(KEY, choice.value);
  } catch {
    // without storage it holds until the page is closed
  }
}

export const calm = window.matchMedia("(prefers-reduced-motion: reduce)");

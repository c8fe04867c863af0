// Where in the page one is: the part of the address behind `#`. The server never sees it.

import { computed, signal } from "@preact/signals";

const hash = signal(location.hash);

window.addEventListener("hashchange", () => {
  hash.value = location.hash;
});

export interface Place {
  name: "jobs" | "job" | "new" | "machines" | "money" | "nowhere";
  id: string;
}

export const place = computed<Place>(() => {
  const [path = ""] = hash.value.replace(/^#\/?/, "").split("?");
  const [name = "", id = ""] = path.split("/");
  if (name === "") return { name: "jobs", id: "" };
  if (name === "jobs") return id ? { name: "job", id: decoded(id) } : { name: "jobs", id: "" };
  if (name === "new" || name === "machines" || name === "money") return { name, id: decoded(id) };
  return { name: "nowhere", id: "" };
});

function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

export const go = (to: string): void => {
  location.hash = to;
};

export const jobPage = (id: string): string => `#/jobs/${encodeURIComponent(id)}`;

// The one place that talks HTTP. An answer that is no success becomes an ApiError with the server's own words.

export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code = "",
    readonly hint = "",
    readonly details: unknown = null,
  ) {
    super(message);
  }

  /** What to show: what happened, and what to do about it. */
  get words(): string {
    return this.hint ? `${this.message} ${this.hint}` : this.message;
  }

  /** Whether the server may have done what was asked although no answer came. */
  get lost(): boolean {
    return this.status === 0;
  }
}

/** Called whenever an answer says that nobody is logged in. */
export const hooks: { loggedOut: () => void } = { loggedOut: () => undefined };

interface Reviving {
  source?: string;
}

/** JSON whose integers beyond 2^53 (seeds have 64 bits) stay exact, as text. */
export function parse(text: string): unknown {
  return JSON.parse(text, function (this: unknown, _key: string, value: unknown, context?: Reviving) {
    const inexact = typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value);
    return inexact && context?.source ? context.source : value;
  } as (this: unknown, key: string, value: unknown) => unknown);
}

interface Sent {
  /** A JSON text or a form; plain values are turned into JSON. */
  body?: FormData | string;
  json?: unknown;
  headers?: Record<string, string>;
  signal?: AbortSignal;
}

async function answer(method: string, path: string, sent: Sent): Promise<Response> {
  const headers: Record<string, string> = { Accept: "application/json", ...sent.headers };
  const body = sent.json === undefined ? sent.body : JSON.stringify(sent.json);
  if (typeof body === "string") headers["Content-Type"] = "application/json";
  let response: Response;
  try {
    response = await fetch(path, {
      method,
      headers,
      credentials: "same-origin",
      ...(body === undefined ? {} : { body }),
      ...(sent.signal ? { signal: sent.signal } : {}),
    });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError("The server did not answer.", 0, "no-answer", "Is comfyctl serve still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) hooks.loggedOut();
  throw await refusal(response);
}

async function refusal(response: Response): Promise<ApiError> {
  const text = await response.text().catch(() => "");
  let told: { detail?: unknown; error?: { code?: string; message?: string; hint?: string | null; details?: unknown } } = {};
  try {
    told = (parse(text) ?? {}) as typeof told;
  } catch {
    // not JSON: the status alone is told
  }
  const { detail, error } = told;
  const message = error?.message ?? (typeof detail === "string" ? detail : `The server answered ${response.status}.`);
  return new ApiError(message, response.status, error?.code ?? "", error?.hint ?? "", error?.details ?? detail);
}

export async function ask<T>(method: string, path: string, sent: Sent = {}): Promise<T> {
  const response = await answer(method, path, sent);
  const text = await response.text();
  return (text ? parse(text) : null) as T;
}

export const get = <T>(path: string, signal?: AbortSignal): Promise<T> => ask<T>("GET", path, signal ? { signal } : {});

export async function getText(path: string): Promise<string> {
  return (await answer("GET", path, { headers: { Accept: "text/plain" } })).text();
}

/** An address of a job or of something of it; ids go into paths only encoded. */
export const jobUrl = (id: string, rest = ""): string => `/jobs/${encodeURIComponent(id)}${rest}`;

/** The words for whatever was thrown. */
export function wordsOf(error: unknown): string {
  if (error instanceof ApiError) return error.words;
  return error instanceof Error ? error.message : String(error);
}

/** A key for one submission; `randomUUID` exists on secure pages only. */
export function newKey(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

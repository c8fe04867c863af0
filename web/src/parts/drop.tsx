// A place for a file: dropped, pasted, or chosen. It is sent at once, so that the form itself is small.

import { useEffect, useRef, useState } from "preact/hooks";

import { ask, wordsOf } from "../api";
import { bytes } from "../format";
import { Picture } from "./pieces";

interface Upload {
  upload: string;
  kind: string;
  file: string;
  size_bytes: number;
}

interface Given {
  id: string;
  label: string;
  picture: boolean;
  required: boolean;
  describedBy: string | undefined;
  invalid: boolean;
  /** Takes what is pasted anywhere on the page. */
  pastes: boolean;
  /** `upload:ID`, or nothing yet; `sending` while the bytes are on their way. */
  onChange: (value: string, sending: boolean) => void;
}

export function Drop({ id, label, picture, required, describedBy, invalid, pastes, onChange }: Given) {
  const [file, setFile] = useState<{ name: string; size: number; shown: string } | null>(null);
  const [state, setState] = useState<"" | "sending" | "sent">("");
  const [fault, setFault] = useState("");
  const [over, setOver] = useState(false);
  const input = useRef<HTMLInputElement>(null);
  const turn = useRef<AbortController | null>(null);

  const take = (given: File | null | undefined): void => {
    if (!given) return;
    turn.current?.abort();
    const mine = (turn.current = new AbortController());
    setFault("");
    if (picture && given.type && !given.type.startsWith("image/")) {
      setFault(`“${given.name}” is no picture.`);
      return;
    }
    setFile({ name: given.name, size: given.size, shown: picture ? URL.createObjectURL(given) : "" });
    setState("sending");
    onChange("", true);
    const form = new FormData();
    form.append("file", given, given.name || "pasted.png");
    ask<Upload>("POST", "/uploads", { body: form, signal: mine.signal })
      .then((told) => {
        if (mine.signal.aborted) return;
        setState("sent");
        onChange(`upload:${told.upload}`, false);
      })
      .catch((error: unknown) => {
        if (mine.signal.aborted) return;
        setState("");
        setFile(null);
        setFault(wordsOf(error));
        onChange("", false);
      });
  };
  const remove = (): void => {
    turn.current?.abort();
    setFile(null);
    setState("");
    onChange("", false);
    if (input.current) input.current.value = "";
    input.current?.focus();
  };

  useEffect(() => () => void (file?.shown && URL.revokeObjectURL(file.shown)), [file]);
  useEffect(() => () => turn.current?.abort(), []);
  useEffect(() => {
    if (!pastes) return undefined;
    const paste = (event: ClipboardEvent): void => {
      const found = [...(event.clipboardData?.files ?? [])].find((one) => !picture || one.type.startsWith("image/"));
      if (!found) return;
      event.preventDefault();
      take(found);
    };
    window.addEventListener("paste", paste);
    return () => window.removeEventListener("paste", paste);
  }, [pastes, picture]);

  const drop = (event: DragEvent): void => {
    event.preventDefault();
    setOver(false);
    take(event.dataTransfer?.files[0]);
  };
  const told = [describedBy, fault ? `${id}-fault` : "", `${id}-state`].filter(Boolean).join(" ");
  return (
    <div
      class={`drop ${over ? "over" : ""} ${file ? "filled" : ""}`}
      onDragOver={(event) => { event.preventDefault(); setOver(true); }}
      onDragLeave={() => setOver(false)}
      onDrop={drop}
    >
      {file?.shown && <Picture src={file.shown} alt={`The chosen picture, ${file.name}`} />}
      <div class="drop-words">
        <input
          ref={input}
          id={id}
          type="file"
          class="covered"
          {...(picture ? { accept: "image/*" } : {})}
          required={required && !file}
          aria-describedby={told}
          aria-invalid={invalid || fault !== ""}
          onChange={(event) => take(event.currentTarget.files?.[0])}
        />
        <p id={`${id}-state`} role="status">
          {file ? `${file.name || "Pasted picture"}, ${bytes(file.size)}${state === "sending" ? ", sending…" : ""}` : ""}
        </p>
        {!file && <p aria-hidden="true"><span class="button">Choose a {picture ? "picture" : "file"}</span> or drop it here{pastes ? ", or paste" : ""}</p>}
        {file && <p class="lift"><button type="button" onClick={remove}>Take out<span class="hidden"> {label}</span></button></p>}
        {fault && <p class="error" id={`${id}-fault`} role="alert">{fault}</p>}
      </div>
    </div>
  );
}

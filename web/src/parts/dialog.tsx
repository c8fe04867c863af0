// Asks before something that cannot be taken back. The browser's own dialog keeps the focus inside and obeys Escape.

import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";

interface Question {
  title: string;
  text: string;
  yes: string;
  no: string;
  done: (answer: boolean) => void;
}

const question = signal<Question | null>(null);

/** Resolves to true only if the person said yes. */
export function askPerson(title: string, text: string, yes: string, no = "Keep it"): Promise<boolean> {
  question.value?.done(false);
  return new Promise((resolve) => {
    question.value = {
      title,
      text,
      yes,
      no,
      done: (answer) => {
        question.value = null;
        resolve(answer);
      },
    };
  });
}

export function Asking() {
  const asked = question.value;
  const dialog = useRef<HTMLDialogElement>(null);
  const sure = useRef(false);
  // Closing first gives the focus back to where it was; only then does the dialog go.
  const say = (answer: boolean) => (): void => {
    sure.current = answer;
    dialog.current?.close();
  };
  useEffect(() => {
    sure.current = false;
    if (asked && dialog.current && !dialog.current.open) dialog.current.showModal();
  }, [asked]);
  if (!asked) return null;
  return (
    <dialog ref={dialog} aria-labelledby="asked" aria-describedby="asked-more" onClose={() => asked.done(sure.current)}>
      <h2 id="asked">{asked.title}</h2>
      <p id="asked-more">{asked.text}</p>
      <div class="row end">
        <button type="button" onClick={say(false)}>{asked.no}</button>
        <button type="button" class="danger" onClick={say(true)}>{asked.yes}</button>
      </div>
    </dialog>
  );
}

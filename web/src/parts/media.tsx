// One file of a job, shown as what it is. Whatever cannot be shown can be downloaded.

import { useEffect, useState } from "preact/hooks";

import { getText, wordsOf } from "../api";
import { bytes } from "../format";
import type { InputFile, OutputFile } from "../types";
import { MeshView } from "./mesh_view";
import { Picture } from "./pieces";

const TEXT_SHOWN = 20_000;

export function Media({ file, role }: { file: InputFile | OutputFile; role: "in" | "out" }) {
  const out = "media_type" in file && role === "out" ? file : null;
  const mesh = out?.media_type === "model/gltf-binary";
  return (
    <li class={mesh ? "wide" : undefined}>
      <figure>
        <Body file={file} out={out} mesh={mesh} />
        <figcaption>
          <b>{role === "in" ? "In" : "Out"}: {file.name}</b>
          {out && (
            <span>
              {bytes(out.size_bytes)} · <a href={`${out.url}?download=1`} download>Download<span class="hidden"> {out.file}</span></a>
            </span>
          )}
        </figcaption>
      </figure>
    </li>
  );
}

function Body({ file, out, mesh }: { file: InputFile; out: OutputFile | null; mesh: boolean }) {
  if (mesh) return <MeshView url={file.url} name={file.name} />;
  switch (file.kind) {
    case "image":
      return <a href={file.url} target="_blank" rel="noreferrer"><Picture src={file.url} alt={`${file.name}, opens in full size`} /></a>;
    case "video":
      return <video src={file.url} controls loop playsInline preload="metadata" aria-label={file.name} />;
    case "audio":
      return <audio src={file.url} controls preload="metadata" aria-label={file.name} />;
    case "text":
      return <Words url={file.url} name={file.name} />;
    default:
      return <p class="muted nothing">{out?.file ?? file.name}</p>;
  }
}

function Words({ url, name }: { url: string; name: string }) {
  const [text, setText] = useState<string | null>(null);
  useEffect(() => {
    getText(url)
      .then((found) => setText(found.length > TEXT_SHOWN ? `${found.slice(0, TEXT_SHOWN)}\n… and more in the file` : found))
      .catch((error: unknown) => setText(wordsOf(error)));
  }, [url]);
  return <pre tabIndex={0} role="region" aria-label={name}>{text ?? "Loading…"}</pre>;
}

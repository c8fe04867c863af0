import { span } from "../format";
import type { NodeTime } from "../types";

/** Which node ran when: a table whose last column draws it. */
export function Timeline({ nodes, running }: { nodes: NodeTime[]; running: boolean }) {
  if (!nodes.length) return null;
  const end = Math.max(...nodes.map((node) => node.started_s + (node.seconds ?? 0)), 0.001);
  const longest = nodes.reduce((best, node) => ((node.seconds ?? 0) > (best.seconds ?? 0) ? node : best));
  return (
    <section aria-labelledby="nodes">
      <h2 id="nodes">Nodes</h2>
      <div class="scroll" tabIndex={0} role="region" aria-label="Nodes, as a table">
        <table class="timeline">
          <thead><tr><th scope="col">Node</th><th scope="col">Took</th><th scope="col" class="drawn">From start to end</th></tr></thead>
          <tbody>
            {nodes.map((node) => (
              <tr key={node.node_id}>
                <th scope="row">{node.title || node.class_type || node.node_id}</th>
                <td>{node.cached ? "kept" : node.seconds === null ? (running ? "running" : "–") : span(node.seconds)}</td>
                <td class="drawn" aria-hidden="true">
                  <svg width="100%" height="12">
                    <rect class="track" width="100%" height="12" rx="3" />
                    <rect class={node.cached ? "kept" : node === longest ? "longest" : "took"} x={share(node.started_s, end)} width={node.cached ? "2" : width(node, end)} height="12" rx="3" />
                  </svg>
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

const share = (part: number, whole: number): string => `${((100 * Math.min(part, whole)) / whole).toFixed(2)}%`;

const width = (node: NodeTime, end: number): string => `${Math.max(0.6, (100 * (node.seconds ?? end - node.started_s)) / end).toFixed(2)}%`;

// Builds the page into the Python package. The output holds no time and no path, so one environment builds it twice alike.

import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join, relative, sep } from "node:path";
import { fileURLToPath } from "node:url";
import { defineConfig, type Plugin } from "vite";

const here = dirname(fileURLToPath(import.meta.url));
const built = join(here, "..", "launcher", "dashboard");
const backend = process.env["COMFYCTL_SERVE"] ?? "http://127.0.0.1:8000";

/** Every file the build depends on, as paths with slashes, sorted by their bytes. */
function sources(folder = here): string[] {
  return readdirSync(folder, { withFileTypes: true })
    .flatMap((entry) => {
      if (entry.name === "node_modules" || entry.name.startsWith(".")) return [];
      const path = join(folder, entry.name);
      return entry.isDirectory() ? sources(path) : [relative(here, path).split(sep).join("/")];
    })
    .sort((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)));
}

/** One line that `tests/docs/test_dashboard_fresh.py` computes again without Node: is what was built of these sources? */
function fingerprint(): Plugin {
  return {
    name: "sources-sha256",
    apply: "build",
    closeBundle() {
      const whole = createHash("sha256");
      for (const path of sources()) {
        const text = readFileSync(join(here, path), "utf8").replaceAll("\r\n", "\n");
        whole.update(`${path}\0${createHash("sha256").update(text).digest("hex")}\n`);
      }
      writeFileSync(join(built, "sources.sha256"), `${whole.digest("hex")}\n`);
    },
  };
}

export default defineConfig({
  plugins: [fingerprint()],
  build: {
    outDir: built,
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    chunkSizeWarningLimit: 900,
    reportCompressedSize: false,
    rollupOptions: {
      output: {
        entryFileNames: "assets/page-[hash].js",
        chunkFileNames: "assets/[name]-[hash].js",
        assetFileNames: "assets/[name]-[hash][extname]",
      },
    },
  },
  server: {
    proxy: Object.fromEntries(
      ["/jobs", "/events", "/machines", "/costs", "/queue", "/workflows", "/uploads", "/session", "/presence", "/health"].map(
        (path) => [path, { target: backend, changeOrigin: true }],
      ),
    ),
  },
});

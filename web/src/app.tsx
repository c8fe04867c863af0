import { useEffect, useRef } from "preact/hooks";

import { Footer } from "./parts/footer";
import { Header } from "./parts/header";
import { Notices } from "./parts/notices";
import { JobPage } from "./pages/job";
import { Jobs } from "./pages/jobs";
import { LoggedOut } from "./pages/logged_out";
import { MachinesPage } from "./pages/machines";
import { MoneyPage } from "./pages/money";
import { NewJob } from "./pages/new_job";
import { place, type Place } from "./route";
import { counts, link, session } from "./store";

const TITLES: Record<Place["name"], string> = {
  jobs: "Jobs",
  job: "Job",
  new: "New job",
  machines: "Machines",
  money: "Money",
  nowhere: "Not found",
};

export function App() {
  const at = place.value;
  const main = useRef<HTMLElement>(null);
  const first = useRef(true);
  const running = counts.value.processing;

  useEffect(() => {
    document.title = `${running ? `(${running}) ` : ""}${TITLES[at.name]} · comfyctl`;
  }, [at.name, running]);

  useEffect(() => {
    // A new place begins at its top, for the eye and for a screen reader.
    if (!first.current) {
      window.scrollTo(0, 0);
      main.current?.focus({ preventScroll: true });
    }
    first.current = false;
  }, [at.name, at.id]);

  if (session.value === "none") return <LoggedOut />;
  if (session.value === "unknown") {
    return (
      <main class="alone">
        <p role="status">{link.value === "lost" ? "The server does not answer. Trying again…" : "Connecting…"}</p>
      </main>
    );
  }
  return (
    <>
      <a class="skip" href="#main" onClick={(event) => { event.preventDefault(); main.current?.focus(); }}>
        Skip to the content
      </a>
      <Header />
      <main id="main" ref={main} tabIndex={-1}>
        {at.name === "jobs" && <Jobs />}
        {at.name === "job" && <JobPage key={at.id} id={at.id} />}
        {at.name === "new" && <NewJob chosen={at.id} />}
        {at.name === "machines" && <MachinesPage />}
        {at.name === "money" && <MoneyPage />}
        {at.name === "nowhere" && (
          <div class="empty">
            <h1>There is nothing here</h1>
            <p><a href="#/">Back to the jobs</a></p>
          </div>
        )}
      </main>
      <Footer />
      <Notices />
    </>
  );
}

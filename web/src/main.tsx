import "./style.css";

import { render } from "preact";

import { App } from "./app";
import { begin } from "./live";

const root = document.getElementById("page");
if (root) render(<App />, root);
void begin();

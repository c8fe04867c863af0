// The 3D viewer: a chunk of its own, fetched when the first mesh is looked at. It draws into one canvas and fetches one file.

import {
  Box3,
  Color,
  DirectionalLight,
  Group,
  HemisphereLight,
  Material,
  Mesh,
  MeshStandardMaterial,
  PerspectiveCamera,
  Scene,
  SRGBColorSpace,
  TextureLoader,
  Vector3,
  WebGLRenderer,
} from "three";
import { OrbitControls } from "three/addons/controls/OrbitControls.js";
import { GLTFLoader, type GLTFParser } from "three/addons/loaders/GLTFLoader.js";

export interface Viewer {
  /** Let it turn by itself, or hold it still. */
  turning(on: boolean): void;
  /** Turn by so many radians, sideways and up. */
  turn(sideways: number, up: number): void;
  /** Come nearer (below 1) or go away (above 1). */
  zoom(factor: number): void;
  reset(): void;
  close(): void;
}

const START = new Vector3(1.5, 0.9, 2.1);
const LARGEST_BYTES = 200_000_000;

/** Load a GLB and show it in the canvas. Rejects in words if there is no WebGL or the file is no GLB. */
export async function view(canvas: HTMLCanvasElement, url: string, signal: AbortSignal): Promise<Viewer> {
  const renderer = rendererFor(canvas);
  try {
    const model = await load(url, signal);
    return show(canvas, renderer, model);
  } catch (error) {
    renderer.dispose();
    throw error;
  }
}

function rendererFor(canvas: HTMLCanvasElement): WebGLRenderer {
  try {
    const renderer = new WebGLRenderer({ canvas, antialias: true, alpha: true });
    renderer.outputColorSpace = SRGBColorSpace;
    renderer.setPixelRatio(Math.min(window.devicePixelRatio, 2));
    return renderer;
  } catch {
    throw new Error("This browser cannot draw in three dimensions (WebGL is missing or switched off).");
  }
}

async function load(url: string, signal: AbortSignal): Promise<Group> {
  const response = await fetch(url, { credentials: "same-origin", signal });
  if (!response.ok) throw new Error(`The mesh could not be fetched (${response.status}).`);
  if (Number(response.headers.get("Content-Length") ?? 0) > LARGEST_BYTES) throw new Error("The mesh is too large to be shown here.");
  const data = await response.arrayBuffer();
  const loader = new GLTFLoader();
  // Pictures inside the file go through <img>: the other way is fetch(blob:), which the page's policy rightly refuses.
  loader.register((parser: GLTFParser) => {
    (parser as unknown as { textureLoader: TextureLoader }).textureLoader = new TextureLoader(parser.options.manager);
    return { name: "pictures_by_img" };
  });
  try {
    const { scene } = await loader.parseAsync(data, "");
    return scene;
  } catch {
    throw new Error("The file cannot be shown: it is no GLB this viewer knows.");
  }
}

function show(canvas: HTMLCanvasElement, renderer: WebGLRenderer, model: Group): Viewer {
  const scene = new Scene();
  scene.add(fitted(model), new HemisphereLight(new Color("#ffffff"), new Color("#8a8f98"), 2.2));
  const key = new DirectionalLight(new Color("#ffffff"), 2.4);
  key.position.set(2, 3, 4);
  const rim = new DirectionalLight(new Color("#ffffff"), 1.2);
  rim.position.set(-3, 1, -3);
  scene.add(key, rim);

  const camera = new PerspectiveCamera(35, 1, 0.01, 50);
  const controls = new OrbitControls(camera, canvas);
  controls.enablePan = false;
  controls.enableDamping = true;
  controls.minDistance = 1;
  controls.maxDistance = 10;
  controls.autoRotateSpeed = 1.6;
  // A drag up or down moves the page, so that a phone can scroll past; one sideways turns the mesh.
  canvas.style.touchAction = "pan-y";

  let asked = 0;
  const draw = (): void => {
    asked = 0;
    const moves = controls.update();
    renderer.render(scene, camera);
    if (moves || controls.autoRotate) wake();
  };
  const wake = (): void => {
    asked ||= requestAnimationFrame(draw);
  };
  controls.addEventListener("change", wake);
  controls.addEventListener("start", wake);

  const fit = (): void => {
    const { clientWidth: width, clientHeight: height } = canvas;
    if (!width || !height) return;
    renderer.setSize(width, height, false);
    camera.aspect = width / height;
    camera.updateProjectionMatrix();
    wake();
  };
  const watch = new ResizeObserver(fit);
  watch.observe(canvas);

  const place = (position: Vector3): void => {
    camera.position.copy(position);
    camera.lookAt(0, 0, 0);
    controls.update();
    wake();
  };
  place(START);
  fit();

  return {
    turning(on) {
      controls.autoRotate = on;
      wake();
    },
    turn(sideways, up) {
      const { radius, theta, phi } = polar(camera.position);
      const steep = Math.min(Math.PI - 0.05, Math.max(0.05, phi - up));
      place(new Vector3().setFromSphericalCoords(radius, steep, theta + sideways));
    },
    zoom(factor) {
      const length = camera.position.length() * factor;
      place(camera.position.clone().setLength(Math.min(controls.maxDistance, Math.max(controls.minDistance, length))));
    },
    reset: () => place(START),
    close() {
      cancelAnimationFrame(asked);
      watch.disconnect();
      controls.dispose();
      free(model);
      renderer.dispose();
    },
  };
}

const polar = (at: Vector3): { radius: number; theta: number; phi: number } => {
  const radius = at.length();
  return { radius, theta: Math.atan2(at.x, at.z), phi: Math.acos(Math.max(-1, Math.min(1, at.y / radius))) };
};

/** The model in the middle and of one size, whatever its units; double-sided, because scans and cuts often are. */
function fitted(model: Group): Group {
  const box = new Box3().setFromObject(model);
  const size = box.getSize(new Vector3());
  const largest = Math.max(size.x, size.y, size.z) || 1;
  const holder = new Group();
  model.position.sub(box.getCenter(new Vector3()));
  holder.add(model);
  holder.scale.setScalar(1.15 / largest);
  model.traverse((part) => {
    if (!(part instanceof Mesh)) return;
    if (!part.geometry.attributes["normal"]) part.geometry.computeVertexNormals();
    const material: unknown = part.material;
    if (material instanceof MeshStandardMaterial && !material.map) material.metalness = Math.min(material.metalness, 0.4);
  });
  return holder;
}

function free(model: Group): void {
  model.traverse((part) => {
    if (!(part instanceof Mesh)) return;
    part.geometry.dispose();
    for (const material of [part.material].flat()) if (material instanceof Material) material.dispose();
  });
}

// Shows the frames of props.value: { panels: [{ title, columns, told, frames: [{ caption, xt, x0, notes }] }], pixelated }
const part = (name) => element.querySelector(`[data-part="${name}"]`);
const KINDS = { xt: "xₜ, what the model sees", x0: "x̂₀, what it takes the image to be" };
const MILLISECONDS = 110;
let position = 0;
let timer = null;

const make = (tag, className, text = "") => {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
};

const row = (className, texts, colors = []) => {
  const node = make("div", className);
  texts.forEach((text, i) => {
    const cell = make("span", "", text);
    if (colors[i]) cell.style.borderBottomColor = colors[i];
    node.append(cell);
  });
  return node;
};

const panels = () => (props.value && props.value.panels) || [];
const last = () => Math.max(0, ...panels().map((panel) => panel.frames.length - 1));

let laidOut = "";

function layOut() {
  const layout = JSON.stringify(panels().map((panel) => [panel.title, panel.columns, panel.told]));
  if (layout === laidOut && part("panels").children.length) return;
  laidOut = layout;
  part("panels").replaceChildren(
    ...panels().map((panel) => {
      const node = make("section", "panel");
      node.append(make("h3", "", panel.title), row("names", panel.columns, panel.colors));
      for (const kind of Object.keys(KINDS)) {
        const image = document.createElement("img");
        image.dataset.kind = kind;
        image.alt = `${panel.title}: ${panel.columns.join(", ")}; ${KINDS[kind]}`;
        node.append(make("div", "kind", KINDS[kind]), image);
      }
      node.append(make("div", "kind", panel.told), make("div", "notes"));
      return node;
    }),
  );
  part("panels").classList.toggle("pixelated", Boolean(props.value.pixelated));
}

function show(index) {
  position = Math.min(index, last());
  const nodes = part("panels").children;
  panels().forEach((panel, i) => {
    const frame = panel.frames[position];
    if (!frame || !nodes[i]) return;
    nodes[i].querySelectorAll("img").forEach((image) => (image.src = frame[image.dataset.kind]));
    nodes[i].querySelector(".notes").replaceWith(row("notes", frame.notes));
    part("caption").textContent = frame.caption;
  });
  part("scrub").max = last();
  part("scrub").value = position;
}

function pause() {
  clearInterval(timer);
  timer = null;
  part("play").textContent = "▶";
  part("play").setAttribute("aria-label", "Play the film");
}

function play() {
  if (position >= last()) position = 0;
  timer = setInterval(() => (position < last() ? show(position + 1) : pause()), MILLISECONDS);
  part("play").textContent = "❚❚";
  part("play").setAttribute("aria-label", "Pause the film");
}

function refresh() {
  const any = panels().some((panel) => panel.frames.length > 0);
  part("placeholder").hidden = any;
  part("screen").hidden = !any;
  part("placeholder").textContent = (props.value && props.value.placeholder) || "";
  if (!any) return;
  pause();
  layOut();
  show(last());
}

element.addEventListener("click", (event) => {
  if (event.target.dataset.part === "play") timer ? pause() : play();
});
element.addEventListener("input", (event) => {
  if (event.target.dataset.part === "scrub") {
    pause();
    show(Number(event.target.value));
  }
});
watch("value", refresh);
refresh();

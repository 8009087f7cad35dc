const facts = JSON.parse(document.getElementById('facts').textContent);
const at = id => document.getElementById(id);
const make = (name, fields = {}, ...children) => {
  const node = Object.assign(document.createElement(name), fields);
  node.append(...children);
  return node;
};
const views = {overlay: 'overlay', mask: 'mask', confidence: 'confidence', photograph: 'photograph'};
let file = null, answer = null, view = 'overlay', waiting = null, running = false, again = false;

for (const {name, title, least, greatest, step} of facts.sliders) {
  const value = Math.min(Math.max(facts.values[name], least), greatest);
  const output = make('output', {textContent: value});
  const input = make('input', {type: 'range', name, min: least, max: greatest, step: 'any', value});
  input.dataset.step = step;
  input.addEventListener('input', () => {
    output.textContent = Math.round(input.value / step) * step;
    soon();
  });
  at('sliders').append(make('label', {className: 'row'}, title, output, input));
}
for (const name of facts.classes)
  at('tags').append(make('label', {className: 'check'}, make('input', {type: 'checkbox', name: 'tag', value: name, onchange: soon}), ' ' + name));
for (const [name, title] of Object.entries(views)) {
  const button = make('button', {type: 'button', textContent: title, onclick: () => { view = name; show(); }});
  button.dataset.view = name;
  at('views').append(button);
}
at('crf').onchange = soon;
at('reset').onclick = () => {
  for (const input of at('sliders').querySelectorAll('input')) {
    input.value = facts.values[input.name];
    input.previousElementSibling.textContent = facts.values[input.name];
    delete input.dataset.moved;
  }
  soon();
};
at('sliders').addEventListener('input', event => { event.target.dataset.moved = 1; });
at('file').onchange = event => take(event.target.files[0]);
const drop = at('drop');
for (const kind of ['dragenter', 'dragover']) drop.addEventListener(kind, event => { event.preventDefault(); drop.classList.add('over'); });
for (const kind of ['dragleave', 'drop']) drop.addEventListener(kind, event => { event.preventDefault(); drop.classList.remove('over'); });
drop.addEventListener('drop', event => take(event.dataTransfer.files[0]));
for (const kind of ['dragover', 'drop']) window.addEventListener(kind, event => event.preventDefault());

function take(chosen) { if (chosen) { file = chosen; run(); } }
function soon() { clearTimeout(waiting); waiting = setTimeout(run, 250); }
function say(text, isError = false) { at('status').textContent = text; at('status').classList.toggle('error', isError); }

async function run() {
  if (!file) return;
  if (running) { again = true; return; }
  running = true;
  say(answer ? 'working …' : 'working … the first photograph takes longest');
  const query = new URLSearchParams({crf: at('crf').checked ? 1 : 0});
  for (const input of at('sliders').querySelectorAll('input[data-moved]'))
    query.set(input.name, Math.round(input.value / input.dataset.step) * input.dataset.step);
  for (const input of at('tags').querySelectorAll('input:checked')) query.append('tag', input.value);
  const started = performance.now();
  try {
    const response = await fetch('/segment?' + query, {method: 'POST', body: file, headers: {'X-Requested-With': 'lcrf_jax'}});
    const received = await response.json();
    if (!response.ok) throw new Error(received.error || response.statusText);
    answer = received;
    const used = at('tags').querySelector('input:checked') ? ', tags used' : '';
    say(`${file.name}: ${((performance.now() - started) / 1000).toFixed(1)} s${used}`);
    show();
  } catch (error) {
    say(error.message, true);
  }
  running = false;
  if (again) { again = false; run(); }
}
function show() {
  if (!answer) return;
  at('shown').hidden = false;
  for (const button of at('views').children) button.setAttribute('aria-pressed', button.dataset.view === view);
  at('picture').src = answer[view];
  at('picture').alt = views[view];
  const percent = value => (100 * value).toFixed(1) + ' %';
  at('classes').replaceChildren(...answer.classes.map(({name, colour, area, confidence}) => {
    const swatch = make('i', {className: 'swatch'});
    swatch.style.background = colour;
    return make('tr', {}, make('th', {scope: 'row'}, swatch, name), make('td', {textContent: percent(area)}), make('td', {textContent: percent(confidence)}));
  }));
}

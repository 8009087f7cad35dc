const facts = JSON.parse(document.getElementById('facts').textContent);
const at = id => document.getElementById(id);
const make = (name, fields = {}, ...children) => {
  const node = Object.assign(document.createElement(name), fields);
  node.append(...children);
  return node;
};
const views = {overlay: 'overlay', mask: 'mask', confidence: 'confidence', photograph: 'photograph'};
let file = null, answer = null, view = 'overlay', waiting = null, running = null, address = null, again = false, several = false;

for (const {name, title, least, greatest, step, meaning} of facts.sliders) {
  const value = Math.min(Math.max(facts.values[name], least), greatest);
  const output = make('output', {textContent: value});
  const input = make('input', {type: 'range', name, min: least, max: greatest, step: 'any', value});
  input.dataset.step = step;
  input.addEventListener('input', () => {
    output.textContent = Math.round(input.value / step) * step;
    soon();
  });
  at('sliders').append(make('label', {className: 'row'}, title, output, input, make('small', {textContent: meaning})));
}
for (const name of facts.classes)
  at('tags').append(make('label', {className: 'check'}, make('input', {type: 'checkbox', name: 'tag', value: name, onchange: soon}), ' ' + name));
for (const [name, title] of Object.entries(views)) {
  const button = make('button', {type: 'button', textContent: title, onclick: () => { view = name; show(); }});
  button.dataset.view = name;
  at('views').append(button);
}
for (const [number, {name, thumbnail}] of facts.examples.entries()) {
  const button = make('button', {type: 'button'}, make('img', {src: thumbnail, alt: `example ${name}`}));
  button.onclick = async () => {
    try {
      const response = await fetch(`examples/${number}`);
      if (!response.ok) throw new Error(`${name} is not there any more`);
      take([new File([await response.blob()], name)]);
    } catch (error) { fail(error); }
  };
  document.querySelector('.examples').append(button);
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
at('file').accept = facts.formats.join(',');
at('file').onchange = event => {
  take(event.target.files);
  event.target.value = '';  // so that the same file can be chosen again
};
const drop = at('drop');
for (const kind of ['dragenter', 'dragover']) drop.addEventListener(kind, event => { event.preventDefault(); drop.classList.add('over'); });
for (const kind of ['dragleave', 'drop']) drop.addEventListener(kind, event => { event.preventDefault(); drop.classList.remove('over'); });
drop.addEventListener('drop', event => take(event.dataTransfer.files));
for (const kind of ['dragover', 'drop']) window.addEventListener(kind, event => event.preventDefault());

function take([chosen, ...others]) {
  if (!chosen) { fail(new Error('that is no file; choose a photograph of this machine')); return; }
  file = chosen;
  several = others.length > 0;
  clear();  // what is shown is of another photograph
  preview(file);
  if (running) running.abort();
  run();
}
function clear() {
  answer = null;
  at('shown').hidden = true;
  at('shown').classList.remove('busy');
  at('picture').removeAttribute('src');
  if (address) URL.revokeObjectURL(address);
  address = null;
}
function preview(chosen) {  // the photograph itself, until there is an answer; not every browser can show every format
  const shown = new Image();
  address = shown.src = URL.createObjectURL(chosen);
  shown.onload = () => {
    if (answer || chosen !== file || at('status').classList.contains('error')) return;
    at('picture').src = shown.src;
    at('picture').alt = 'the photograph, not segmented yet';
    at('shown').classList.add('busy');
    at('shown').hidden = false;
  };
}
function fail(error) { clear(); say(error.message, true); }
function soon() { clearTimeout(waiting); waiting = setTimeout(run, 250); }
function say(text, isError = false) { at('status').textContent = text; at('status').classList.toggle('error', isError); }

async function send(chosen, query, signal) {
  if (!chosen.size) throw new Error('the file is empty; choose another one, or copy it again');
  if (chosen.size > facts.max_bytes)
    throw new Error(`the file has ${(chosen.size / 1e6).toFixed(1)} MB, more than ${facts.max_bytes / 1e6}: scale the photograph down, or use experiments.predict`);
  let response;
  try {
    response = await fetch('segment?' + query, {method: 'POST', body: chosen, headers: {'X-Requested-With': 'lcrf_jax'}, signal});
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Error('the photograph could not be sent: the program behind the page has ended, or the file has changed or is a folder');
  }
  const received = await response.json().catch(() => ({}));
  if (signal.aborted) throw new Error('not wanted any more');
  if (!response.ok || !received.classes)
    throw new Error(received.error || `the program behind the page answered ${response.status} ${response.statusText}; the window that runs it says more`);
  return received;
}
async function run() {
  if (!file) return;
  if (running) { again = true; return; }
  const asked = file, name = asked.name + (several ? ', the first of several files' : '');
  const request = running = new AbortController();
  say(`${name}: working …${answer ? '' : ' the first photograph of a size takes longest'}`);
  const query = new URLSearchParams({crf: at('crf').checked ? 1 : 0});
  for (const input of at('sliders').querySelectorAll('input[data-moved]'))
    query.set(input.name, Math.round(input.value / input.dataset.step) * input.dataset.step);
  for (const input of at('tags').querySelectorAll('input:checked')) query.append('tag', input.value);
  const started = performance.now();
  try {
    const received = await send(asked, query, request.signal);
    answer = received;
    const used = query.has('tag') ? ', tags used' : '';
    say(`${name}: ${((performance.now() - started) / 1000).toFixed(1)} s${used}${answer.note ? ', ' + answer.note : ''}`);
    show();
  } catch (error) {
    if (!request.signal.aborted) fail(new Error(`${asked.name}: ${error.message}`));
  }
  running = null;
  if (again || asked !== file) { again = false; run(); }
}
function show() {
  if (!answer) return;
  at('shown').hidden = false;
  at('shown').classList.remove('busy');
  for (const [id, picture, end] of [['save_mask', answer.mask, '.png'], ['save_overlay', answer.overlay, '_overlay.jpg']])
    Object.assign(at(id), {href: picture, download: file.name.replace(/\.[^.]*$/, '') + end});
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

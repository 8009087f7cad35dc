document.addEventListener('input', event => {
  const slider = event.target.closest('.compare input');
  if (slider) slider.parentElement.style.setProperty('--at', slider.value + '%');
});
document.addEventListener('change', event => {
  if (event.target.name !== 'layer') return;
  for (const layer of document.querySelectorAll('.layer')) layer.hidden = layer.dataset.layer !== event.target.value;
});

document.addEventListener('input', event => {
  const slider = event.target.closest('.compare input');
  if (slider) slider.parentElement.style.setProperty('--at', slider.value + '%');
});
document.addEventListener('change', event => {
  if (!event.target.closest('.layers')) return;
  const [left, right] = ['left', 'right'].map(side => document.querySelector(`.layers input[name=${side}]:checked`).value);
  for (const picture of document.querySelectorAll('.layer')) {
    const isLeft = picture.dataset.layer === left, isRight = picture.dataset.layer === right;
    picture.hidden = !isLeft && !isRight;
    picture.classList.toggle('left', isLeft && !isRight);
    picture.classList.toggle('right', isRight && !isLeft);
  }
  for (const label of document.querySelectorAll('.side')) label.textContent = label.classList.contains('left') ? left : right;
});
document.addEventListener('click', event => {
  const button = event.target.closest('.enlarge');
  if (!button) return;
  const large = button.closest('.card').classList.toggle('large');
  button.setAttribute('aria-pressed', large);
  button.textContent = large ? 'reduce' : 'enlarge';
});

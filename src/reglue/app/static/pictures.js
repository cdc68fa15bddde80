// A click on a picture, or Enter on it, is 'picked' with its index.
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-index]');
  if (button) trigger('picked', { index: Number(button.dataset.index) });
});

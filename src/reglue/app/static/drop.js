// Images that are dropped, pasted or chosen are uploaded; the page hears 'uploaded', or 'refused' for what is too large.
const input = element.querySelector('input[type=file]');

function load(address) {
  return new Promise((done) => {
    if (!address) return done(null);
    const image = new Image();
    image.onload = () => done(image);
    image.src = address;
  });
}

async function take(file) {
  if (!file) return;
  const zone = element.querySelector('.zone');
  if (file.size > props.most) return trigger('refused', { name: file.name });
  zone.classList.add('busy');
  try {
    const { path } = await upload(file);
    trigger('uploaded', { path, name: file.name });
  } catch (error) {
    trigger('refused', { name: file.name });
  } finally {
    zone.classList.remove('busy');
    input.value = '';
  }
}

input.addEventListener('change', () => take(input.files[0]));
element.addEventListener('click', (event) => {
  if (event.target.closest('[data-action=choose]')) input.click();
});
element.addEventListener('dragover', (event) => {
  event.preventDefault();
  element.querySelector('.zone').classList.add('over');
});
element.addEventListener('dragleave', () => element.querySelector('.zone').classList.remove('over'));
element.addEventListener('drop', (event) => {
  event.preventDefault();
  element.querySelector('.zone').classList.remove('over');
  take(event.dataTransfer.files[0]);
});
element.addEventListener('paste', (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith('image/'));
  if (file) take(file);
});

// Follows the text as it grows, until the reader scrolls up to read.

const NEAR_PX = 48;

export class Autoscroll {
  #scroller;
  #onChange;
  #lastTop = 0;
  following = true;

  /** *onChange* is called when following starts or ends. */
  constructor(scroller, onChange) {
    this.#scroller = scroller;
    this.#onChange = onChange;
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
  }

  /** Goes to the end and follows from there. */
  follow() {
    this.#set(true);
    this.keepUp();
  }

  /** Call when there may be more text. */
  keepUp() {
    if (this.following) this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    const up = scrollTop < this.#lastTop;
    this.#lastTop = scrollTop;
    const near = scrollHeight - clientHeight - scrollTop < NEAR_PX;
    // Text that grew between two frames also leaves the end behind; only going up is the
    // reader's doing.
    if (near && !up) this.#set(true);
    else if (up && scrollHeight - clientHeight - scrollTop > 1) this.#set(false);
  }

  #set(following) {
    if (this.following === following) return;
    this.following = following;
    this.#onChange(following);
  }
}

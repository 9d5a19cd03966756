/*
 * A program that stands in for a TDX host: functions with the names, arguments and answers
 * of the kernel's SEAMCALL wrappers, threads that really contend for locks, and a log of
 * what every request took.  Uprobes on it go through the kernel's real tracing.
 *
 * It is no TDX: how often a lock is busy here says nothing about a TDX module.
 *
 * usage: testbed OUT.csv VCPUS ZAPPERS REQUESTS SEED     every request is logged
 *        testbed --flood THREADS SECONDS                 only calls, as fast as they go
 *        testbed --syscalls THREADS SECONDS              system calls instead
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef uint64_t u64;

#define BUSY 0x8000020000000000ULL
#define BUSY_RCX (BUSY | 0x01)
#define BUSY_SEPT (BUSY | 0x92)
#define BUSY_EPOCH (BUSY | 0xA9)
#define WRONG_STATE 0xC000030100000001ULL
#define EXIT_EPT 0x30
#define PAGES 256
#define PAGE_SHIFT 12
#define GPA_BASE 0x80000000ULL
#define GIVE_UP 24
#define ENTER_EVERY 5
#define HOLD_ROUNDS 40

struct td {
	atomic_int tree;  /* -1: exclusive, n: shared */
	atomic_int epoch; /* 1: a TRACK runs */
	atomic_int entry[PAGES];
	atomic_int present[PAGES]; /* 0 free, 1 present, 2 blocked */
	atomic_int n_added[PAGES];
};

struct vp {
	struct td *td;
	u64 exits;
};

struct op {
	const char *function;
	u64 td, vp, gpa;
	int level, attempts, busy;
	u64 start_ns, end_ns, status;
	const char *outcome;
};

struct worker {
	pthread_t thread;
	struct td *td;
	struct vp vp;
	int number, n_requests, is_zapper;
	unsigned seed;
	long tid;
	struct op *ops;
	int n_ops;
};

#define WRAPPER __attribute__((noinline, noclone, used, externally_visible))

static u64 now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (u64)t.tv_sec * 1000000000ULL + (u64)t.tv_nsec;
}

/* What a SEAMCALL does while it holds its locks; now and then another thread gets the CPU. */
static void work(u64 salt)
{
	volatile u64 sink = salt;
	for (int i = 0; i < HOLD_ROUNDS; i++)
		sink = sink * 6364136223846793005ULL + 1;
	if (((salt >> PAGE_SHIFT) & 7) == 3)
		sched_yield();
}

static int share(atomic_int *lock)
{
	int seen = atomic_load(lock);
	while (seen >= 0)
		if (atomic_compare_exchange_weak(lock, &seen, seen + 1))
			return 1;
	return 0;
}

static int own(atomic_int *lock)
{
	int none = 0;
	return atomic_compare_exchange_strong(lock, &none, -1);
}

static int place(u64 gpa)
{
	return (int)((gpa - GPA_BASE) >> PAGE_SHIFT) % PAGES;
}

static u64 on_entry(struct td *td, u64 gpa, int from, int to)
{
	int at = place(gpa);
	if (!own(&td->entry[at]))
		return BUSY_RCX;
	work(gpa);
	int fits = atomic_load(&td->present[at]) == from;
	if (fits)
		atomic_store(&td->present[at], to);
	if (fits && to == 1)
		atomic_fetch_add(&td->n_added[at], 1);
	atomic_store(&td->entry[at], 0);
	return fits ? 0 : WRONG_STATE;
}

static u64 shared_call(struct td *td, u64 gpa, int from, int to)
{
	if (!share(&td->tree))
		return BUSY_SEPT;
	u64 status = on_entry(td, gpa, from, to);
	atomic_fetch_sub(&td->tree, 1);
	return status;
}

WRAPPER u64 tdh_mem_page_aug(struct td *td, u64 gpa, int level, void *page, u64 *e1, u64 *e2)
{
	*e1 = (u64)page;
	*e2 = (u64)level;
	return shared_call(td, gpa, 0, 1);
}

WRAPPER u64 tdh_mem_sept_add(struct td *td, u64 gpa, int level, void *page, u64 *e1, u64 *e2)
{
	*e1 = (u64)page;
	*e2 = (u64)level;
	if (!share(&td->tree))
		return BUSY_SEPT;
	work(gpa);
	atomic_fetch_sub(&td->tree, 1);
	return 0;
}

WRAPPER u64 tdh_mem_range_block(struct td *td, u64 gpa, int level, u64 *e1, u64 *e2)
{
	*e1 = gpa;
	*e2 = (u64)level;
	if (!own(&td->tree))
		return BUSY_SEPT;
	u64 status = on_entry(td, gpa, 1, 2);
	atomic_store(&td->tree, 0);
	return status;
}

WRAPPER u64 tdh_mem_track(struct td *td)
{
	if (!own(&td->epoch))
		return BUSY_EPOCH;
	work(3 << PAGE_SHIFT);
	atomic_store(&td->epoch, 0);
	return 0;
}

WRAPPER u64 tdh_mem_page_remove(struct td *td, u64 gpa, int level, u64 *e1, u64 *e2)
{
	*e1 = gpa;
	*e2 = (u64)level;
	return shared_call(td, gpa, 2, 0);
}

WRAPPER u64 tdh_vp_enter(struct vp *vp, u64 *args)
{
	args[0] = vp->exits++;
	if (!share(&vp->td->epoch))
		return BUSY_EPOCH;
	work(args[0] << PAGE_SHIFT);
	atomic_fetch_sub(&vp->td->epoch, 1);
	return EXIT_EPT;
}

static struct op *begin(struct worker *w, const char *function, u64 gpa, int level)
{
	struct op *op = &w->ops[w->n_ops++];
	op->function = function;
	op->td = (u64)w->td;
	op->gpa = gpa;
	op->level = level;
	op->start_ns = now_ns();
	return op;
}

/* One more attempt was answered; returns whether the caller should try again. */
static int answered(struct op *op, u64 status)
{
	int is_busy = (status & 0xFFFFFFFF00000000ULL) == BUSY;
	op->attempts++;
	op->busy += is_busy;
	op->status = status;
	op->end_ns = now_ns();
	op->outcome = is_busy ? "gave_up" : status >> 63 ? "error" : "success";
	return is_busy && op->attempts < GIVE_UP;
}

static void enter(struct worker *w)
{
	u64 args[13] = {0};
	struct op *op = begin(w, "tdh_vp_enter", 0, -1);
	op->td = 0;
	op->vp = (u64)&w->vp;
	/* Never given up: to enter the vCPU later would be the same request. */
	while (answered(op, tdh_vp_enter(&w->vp, args)) || op->status != EXIT_EPT)
		sched_yield();
}

/* The fault path: it leaves its loop now and then and enters the guest, which faults again. */
static void fault(struct worker *w, u64 gpa)
{
	u64 e1, e2;
	struct op *op = begin(w, "tdh_mem_sept_add", gpa & ~0x1FFFFFULL, 1);
	/* Never given up: without a Secure EPT page the module adds no page. */
	while (answered(op, tdh_mem_sept_add(w->td, op->gpa, 1, op, &e1, &e2)) || op->status)
		;
	op = begin(w, "tdh_mem_page_aug", gpa, 0);
	int before = atomic_load(&w->td->n_added[place(gpa)]);
	while (answered(op, tdh_mem_page_aug(w->td, gpa, 0, op, &e1, &e2)))
		if (op->attempts % ENTER_EVERY == 0) {
			enter(w);
			/* Another thread added the page: KVM finds it, and asks no more. */
			if (atomic_load(&w->td->n_added[place(gpa)]) != before)
				break;
		}
}

static void zap(struct worker *w, u64 gpa)
{
	u64 e1, e2;
	struct op *op = begin(w, "tdh_mem_range_block", gpa, 0);
	while (answered(op, tdh_mem_range_block(w->td, gpa, 0, &e1, &e2)))
		;
	op = begin(w, "tdh_mem_track", 0, -1);
	/* Never given up: to track the TD later would be the same request. */
	while (answered(op, tdh_mem_track(w->td)) || op->status)
		sched_yield();
	op = begin(w, "tdh_mem_page_remove", gpa, 0);
	while (answered(op, tdh_mem_page_remove(w->td, gpa, 0, &e1, &e2)))
		;
}

static void *run(void *argument)
{
	struct worker *w = argument;
	char name[16];
	snprintf(name, sizeof name, w->is_zapper ? "zap %d" : "CPU %d/KVM", w->number);
	pthread_setname_np(pthread_self(), name);
	w->tid = syscall(SYS_gettid);
	u64 pages[PAGES];
	for (int i = 0; i < PAGES; i++) {
		int other = rand_r(&w->seed) % (i + 1);
		pages[i] = pages[other];
		pages[other] = (u64)i;
	}
	for (int i = 0; i < w->n_requests; i++) {
		/* Each page once: giving up and asking again is one chain, whatever lies between. */
		u64 page = pages[i % PAGES] + (u64)(i / PAGES * PAGES);
		if (w->is_zapper) {
			zap(w, GPA_BASE + (page << PAGE_SHIFT));
		} else {
			enter(w);
			fault(w, GPA_BASE + (page << PAGE_SHIFT));
		}
	}
	return NULL;
}

static int truth(const char *path, struct worker *workers, int n)
{
	FILE *out = fopen(path, "w");
	if (!out)
		return perror(path), 1;
	fprintf(out, "tid,function,td,vp,gpa,level,start_ns,end_ns,attempts,busy,outcome,status\n");
	for (int i = 0; i < n; i++)
		for (int k = 0; k < workers[i].n_ops; k++) {
			struct op *op = &workers[i].ops[k];
			fprintf(out,
				"%ld,%s,%" PRIu64 ",%" PRIu64 ",%" PRIu64 ",%d,%" PRIu64 ",%" PRIu64
				",%d,%d,%s,%" PRIu64 "\n",
				workers[i].tid, op->function, op->td, op->vp, op->gpa, op->level,
				op->start_ns, op->end_ns, op->attempts, op->busy, op->outcome,
				op->status);
		}
	return fclose(out) ? perror(path), 1 : 0;
}

static atomic_int is_over;
static atomic_ullong n_calls;

static void *flood(void *argument)
{
	static struct td td;
	u64 e1, e2, n = 0, gpa = GPA_BASE + ((u64)(intptr_t)argument << 32);
	for (; !atomic_load(&is_over); n++)
		tdh_mem_page_aug(&td, gpa + ((n & 1) << 15), 0, &td, &e1, &e2);
	atomic_fetch_add(&n_calls, n);
	return NULL;
}

static void *flood_kernel(void *argument)
{
	u64 n = 0;
	for (; !atomic_load(&is_over); n++)
		syscall(SYS_getppid);
	atomic_fetch_add(&n_calls, n);
	return argument;
}

static int run_flood(void *(*what)(void *), int n_threads, double seconds)
{
	pthread_t threads[64];
	for (int i = 0; i < n_threads && i < 64; i++)
		pthread_create(&threads[i], NULL, what, (void *)(intptr_t)i);
	usleep((useconds_t)(seconds * 1e6));
	atomic_store(&is_over, 1);
	for (int i = 0; i < n_threads && i < 64; i++)
		pthread_join(threads[i], NULL);
	printf("%llu\n", (unsigned long long)n_calls);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "--flood"))
		return run_flood(flood, atoi(argv[2]), atof(argv[3]));
	if (argc == 4 && !strcmp(argv[1], "--syscalls"))
		return run_flood(flood_kernel, atoi(argv[2]), atof(argv[3]));
	if (argc != 6)
		return fprintf(stderr, "usage: %s OUT.csv VCPUS ZAPPERS REQUESTS SEED\n", argv[0]), 2;
	int n_vcpus = atoi(argv[2]), n = n_vcpus + atoi(argv[3]), n_requests = atoi(argv[4]);
	struct worker *workers = calloc((size_t)n, sizeof *workers);
	struct td *td = calloc(1, sizeof *td);
	for (int i = 0; i < n; i++) {
		struct worker *w = &workers[i];
		*w = (struct worker){.td = td, .number = i, .n_requests = n_requests};
		w->vp.td = td;
		w->is_zapper = i >= n_vcpus;
		w->seed = (unsigned)atoi(argv[5]) * 1000 + (unsigned)i;
		w->ops = calloc((size_t)n_requests * (3 + GIVE_UP / ENTER_EVERY), sizeof *w->ops);
	}
	for (int i = 0; i < n; i++)
		pthread_create(&workers[i].thread, NULL, run, &workers[i]);
	for (int i = 0; i < n; i++)
		pthread_join(workers[i].thread, NULL);
	return truth(argv[1], workers, n);
}

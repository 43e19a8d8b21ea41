// The client drives CRIU through libcriu with criu-netlock's library. It takes what CRIU's
// command line takes, so that the tests run it in CRIU's place:
//
//	libcriu [-fail HOOK] [-kill HOOK] [-refuse] [-thread] [-empty-net] dump|restore OPTION...
//
// At HOOK its own part of the callback fails, or it is killed, after ours, or before it
// at network-unlock and post-resume. -refuse: the lock is refused. -thread: in a thread
// that is not the first. -empty-net: the image has no network in it.

#define _GNU_SOURCE
#include <criu/criu.h>
#include <criu_netlock.h>

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *fail_at = "", *kill_at = "";
static int refuse, empty_net;

static int failed(const char *action)
{
	fprintf(stderr, "%s: failed on purpose\n", action);
	return -EPERM;
}

static int callback(char *action, criu_notify_arg_t na)
{
	int ret, out = strcmp(action, "network-unlock") == 0 || strcmp(action, "post-resume") == 0;

	if (out && strcmp(action, kill_at) == 0)
		kill(getpid(), SIGKILL);
	if (!out && strcmp(action, fail_at) == 0)
		return failed(action);
	if (refuse && strcmp(action, "network-lock") == 0) {
		fprintf(stderr, "refused on purpose\n");
		ret = criu_netlock_notify_pid(action, 1); // not the task's
	} else
		ret = criu_netlock_notify(action, na);
	if (ret != 0)
		fprintf(stderr, "%s: %s\n", action, criu_netlock_error());
	if (strcmp(action, kill_at) == 0)
		kill(getpid(), SIGKILL);
	if (out && strcmp(action, fail_at) == 0)
		return failed(action);
	return ret;
}

static int check(int ret, const char *what)
{
	if (ret < 0) {
		perror(what);
		exit(1);
	}
	return ret;
}

static int opened(const char *name)
{
	return check(open(name, O_RDONLY | O_DIRECTORY | O_CLOEXEC), name);
}

static int argc_;
static char **argv_;

static void *run(void *arg)
{
	static const struct option options[] = {
		{ "images-dir", 1, NULL, 'i' }, { "work-dir", 1, NULL, 'w' }, { "log-file", 1, NULL, 'l' }, { "pidfile", 1, NULL, 'p' },
		{ "network-lock", 1, NULL, 'n' }, { "tcp-established", 0, NULL, 't' }, { "leave-running", 0, NULL, 'r' },
		{ "tree", 1, NULL, 'd' }, { "restore-detached", 0, NULL, 'x' }, { "external", 1, NULL, 'e' },
		{ "action-script", 1, NULL, 'a' }, { 0 },
	};
	criu_netlock_opts o = { .size = sizeof(o), .verb = CRIU_NETLOCK_RESTORE, .guard = GUARD };
	const char *verb = argv_[0], *work = NULL, *log = NULL, *pidfile = NULL;
	char name[4096];
	int opt, ret;
	FILE *f, *scripts = NULL;

	(void)arg;
	check(criu_init_opts(), "criu_init_opts");
	criu_set_service_binary("criu");
	criu_set_notify_cb(callback);
	criu_set_log_level(4);
	if (empty_net)
		criu_set_empty_ns(CLONE_NEWNET), o.rules_not_dumped = 1;
	optind = 1;
	while ((opt = getopt_long(argc_, argv_, "v:", options, NULL)) != -1) {
		switch (opt) {
		case 'i': criu_set_images_dir_fd(opened(optarg)); break;
		case 'w':
			work = optarg;
			criu_set_work_dir_fd(opened(work));
			snprintf(name, sizeof(name), "%s/criu.conf", work); // scripts can be named in a file alone
			if ((scripts = fopen(name, "we")) == NULL)
				check(-1, name);
			check(criu_set_config_file(name), "criu_set_config_file");
			break;
		case 'l': criu_set_log_file(log = optarg); break;
		case 'p': pidfile = optarg; break;
		case 'n':
			check(criu_set_network_lock(strcmp(optarg, "skip") == 0 ? CRIU_NETWORK_LOCK_SKIP :
				strcmp(optarg, "nftables") == 0 ? CRIU_NETWORK_LOCK_NFTABLES : CRIU_NETWORK_LOCK_IPTABLES), "criu_set_network_lock");
			break;
		case 't': criu_set_tcp_established(true); break;
		case 'r': criu_set_leave_running(true), o.leave_running = 1; break;
		case 'd': criu_set_pid(o.pid = atoi(optarg)), o.verb = CRIU_NETLOCK_DUMP; break;
		case 'e': check(criu_add_external(optarg), "criu_add_external"); break;
		case 'a': fprintf(scripts, "action-script %s\n", optarg); break;
		case 'v': case 'x': break;
		default: exit(2);
		}
	}
	if (scripts != NULL)
		fclose(scripts);
	snprintf(name, sizeof(name), "%s/netlock.log", work);
	o.log_fd = check(open(name, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600), name);
	if (criu_netlock_init(&o) != 0) {
		fprintf(stderr, "criu_netlock_init: %s\n", criu_netlock_error());
		exit(1);
	}
	ret = strcmp(verb, "dump") == 0 ? criu_dump() : criu_restore();
	if (ret < 0)
		fprintf(stderr, "criu %s: %d\n", verb, ret);
	ret = criu_netlock_close(ret);
	if (ret < 0)
		fprintf(stderr, "criu_netlock_close: %d %s\n", ret, criu_netlock_error());

	// What ours has done belongs to CRIU's log, which the tests read.
	char line[4096], log_name[4096];
	FILE *from = fopen(name, "re"), *to;

	snprintf(log_name, sizeof(log_name), "%s/%s", work, log);
	to = fopen(log_name, "ae");
	while (from != NULL && to != NULL && fgets(line, sizeof(line), from) != NULL)
		fputs(line, to);
	if (to == NULL || fclose(to) != 0)
		check(-1, log_name);
	if (ret < 0)
		exit(1);
	if (pidfile != NULL && ret > 0) {
		if ((f = fopen(pidfile, "we")) == NULL || fprintf(f, "%d", ret) < 0 || fclose(f) != 0)
			check(-1, pidfile);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "fail", 1, NULL, 'f' }, { "kill", 1, NULL, 'k' }, { "refuse", 0, NULL, 'r' }, { "thread", 0, NULL, 't' }, { "empty-net", 0, NULL, 'e' }, { 0 },
	};
	int opt, thread = 0;
	pthread_t t;

	while ((opt = getopt_long_only(argc, argv, "+", options, NULL)) != -1) {
		switch (opt) {
		case 'f': fail_at = optarg; break;
		case 'k': kill_at = optarg; break;
		case 'r': refuse = 1; break;
		case 't': thread = 1; break;
		case 'e': empty_net = 1; break;
		default: return 2;
		}
	}
	argc_ = argc - optind, argv_ = argv + optind;
	if (argc_ < 1)
		return 2;
	if (!thread) {
		run(NULL);
		return 0;
	}
	errno = pthread_create(&t, NULL, run, NULL);
	if (errno != 0 || pthread_join(t, NULL) != 0)
		check(-1, "thread");
	return 0;
}
